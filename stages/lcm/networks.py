"""The networks of a latent consistency distillation: teacher, student, and the target network."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Self

import torch

from schemas.lcm import LcmConfig
from schemas.manifest import Manifest, Teacher
from stages.diffusion.denoiser import UNetDenoiser
from stages.diffusion.guidance import add_guidance_input
from stages.diffusion.lora import add_lora, lora_layers, without_lora
from stages.diffusion.pipeline import TeacherPipeline
from stages.lcm.distillation import TargetNetwork
from stages.students import Student, ready_for_training
from stages.training.randomness import derive_seed
from stages.training.sharding import shard
from stages.workspace import Workspace


@dataclass(frozen=True, eq=False)
class Networks:
    """What `ConsistencyDistillation` is made of."""

    teacher: UNetDenoiser
    student: Student
    target: TargetNetwork | None
    """None: the student itself."""
    as_teacher: Callable[[], AbstractContextManager[None]]
    """While it is open a network that is shared is the teacher."""

    @classmethod
    def build(cls, config: LcmConfig, teacher: Manifest[Teacher], workspace: Workspace, *, seed: int) -> Self:
        """Load the teacher and make the others of it. A LoRA shares its network, a UNet has two copies."""
        pipeline = TeacherPipeline.load(workspace.fetch(teacher), workspace.device, only=frozenset({"unet"}))
        base = pipeline.denoiser()
        if config.network == "lora":
            return cls._lora(config, base, workspace, seed=seed)
        return cls._unet(config, base, workspace)

    @classmethod
    def _lora(cls, config: LcmConfig, base: UNetDenoiser, workspace: Workspace, *, seed: int) -> Self:
        add_lora(base.unet, config.lora_rank, config.lora_alpha, seed=derive_seed(seed, "lora"))
        ready_for_training(base.unet, gradient_checkpointing=config.gradient_checkpointing)
        shard(base.unet, config, workspace.parallel)
        layers = lora_layers(base.unet)
        return cls(base, Student.of_unet(base), None, lambda: without_lora(layers))

    @classmethod
    def _unet(cls, config: LcmConfig, base: UNetDenoiser, workspace: Workspace) -> Self:
        unet = copy.deepcopy(base.unet)
        if config.guidance_w_range is not None:
            add_guidance_input(unet)
        base.unet.requires_grad_(False).to(memory_format=torch.channels_last)
        ready_for_training(unet, gradient_checkpointing=config.gradient_checkpointing)
        averaged = copy.deepcopy(unet).requires_grad_(False)
        student, target = (
            UNetDenoiser(shard(network, config, workspace.parallel), base.schedule, base.prediction) for network in (unet, averaged)
        )
        weights = {name: parameter.detach() for name, parameter in target.unet.named_parameters()}
        return cls(base, Student.of_unet(student), TargetNetwork(target, weights), nullcontext)
