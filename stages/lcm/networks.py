"""The networks of a latent consistency distillation: teacher, student, and the target network."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from schemas.lcm import LcmConfig
from schemas.manifest import Manifest, Teacher
from stages.diffusion.denoiser import UNetDenoiser
from stages.diffusion.guidance import add_guidance_input, takes_guidance
from stages.diffusion.lora import add_lora, load_lora, lora_layers, without_lora
from stages.diffusion.pipeline import TeacherPipeline, load_unet
from stages.lcm.distillation import TargetNetwork
from stages.start import fetch_start
from stages.students import Student, ready_for_training
from stages.training.randomness import derive_seed
from stages.training.sharding import shard
from stages.workspace import Workspace


@dataclass(frozen=True, eq=False)
class Networks:
    """What `ConsistencyDistillation` is made of."""

    teacher: UNetDenoiser | None
    """None: it is not asked."""
    student: Student
    target: TargetNetwork | None
    """None: the student itself."""
    as_teacher: Callable[[], AbstractContextManager[None]]
    """While it is open a network that is shared is the teacher."""

    @classmethod
    def build(cls, config: LcmConfig, teacher: Manifest[Teacher], workspace: Workspace, *, seed: int) -> Self:
        """Load the teacher and make the others of it, or load the student to go on from.

        A LoRA shares the teacher's network; a UNet and its target have their own.
        """
        folder = workspace.fetch(teacher)
        start = fetch_start(config, folder, workspace)
        needed = config.network == "lora" or config.solver == "ddim" or start is None
        base = TeacherPipeline.load(folder, workspace.device, only=frozenset({"unet"}) if needed else frozenset()).denoiser()
        if config.network == "lora":
            return cls._lora(config, base, start, workspace=workspace, seed=seed)
        return cls._unet(config, base, start, workspace=workspace)

    @classmethod
    def _lora(cls, config: LcmConfig, base: UNetDenoiser, start: Path | None, *, workspace: Workspace, seed: int) -> Self:
        if start is None:
            add_lora(base.unet, config.lora_rank, config.lora_alpha, seed=derive_seed(seed, "lora"))
        else:
            load_lora(base.unet, start)
        ready_for_training(base.unet, gradient_checkpointing=config.gradient_checkpointing)
        shard(base.unet, config, workspace.parallel)
        layers = lora_layers(base.unet)
        return cls(base if config.solver == "ddim" else None, Student.of_unet(base), None, lambda: without_lora(layers))

    @classmethod
    def _unet(cls, config: LcmConfig, base: UNetDenoiser, start: Path | None, *, workspace: Workspace) -> Self:
        teacher: UNetDenoiser | None = None
        unet: Any = base.unet if start is None else load_unet(start).to(workspace.device)
        if config.solver == "ddim":
            teacher = base
            unet = copy.deepcopy(unet) if start is None else unet
            base.unet.requires_grad_(False).to(memory_format=torch.channels_last)
        if config.guidance_w_range is not None and not takes_guidance(unet):
            add_guidance_input(unet)
        ready_for_training(unet, gradient_checkpointing=config.gradient_checkpointing)
        averaged = copy.deepcopy(unet).requires_grad_(False)
        student, target = (
            UNetDenoiser(shard(network, config, workspace.parallel), base.schedule, base.prediction) for network in (unet, averaged)
        )
        weights = {name: parameter.detach() for name, parameter in target.unet.named_parameters()}
        return cls(teacher, Student.of_unet(student), TargetNetwork(target, weights), nullcontext)
