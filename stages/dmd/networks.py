"""The networks of a distribution matching distillation: teacher, student, fake score and the head on it."""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from schemas.dmd import DmdConfig
from schemas.manifest import Manifest, Teacher
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.denoiser import UNetDenoiser, unet_output
from stages.diffusion.discriminator import encoder_features, unet_head
from stages.diffusion.lora import add_lora, lora_layers, without_lora
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.prediction import PredictionType
from stages.diffusion.schedule import NoiseSchedule
from stages.students import Student, ready_for_training
from stages.training.randomness import derive_seed
from stages.training.sharding import shard
from stages.workspace import Workspace

_HEAD = "head."


class FakeScore(nn.Module):
    """A UNet that follows the student's distribution, and where there is a GAN a head on its mid block (DMD2 4.3).

    One module for both: divided over processes (FSDP2), its weights are gathered when it is called, and its parts must not be called alone.
    """

    def __init__(self, unet: Any, head: nn.Module | None) -> None:
        super().__init__()
        self.unet, self.head = unet, head

    def forward(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, *, judged: bool = False) -> Tensor:
        """The UNet's output (B, C, h, w), or logits (B,) of being real."""
        if not judged:
            return unet_output(self.unet, x_t, timesteps, conditioning)
        assert self.head is not None, "a GAN has a head"
        logits: Tensor = self.head(encoder_features(self.unet, x_t, timesteps, conditioning))
        return logits.float()


@dataclass(frozen=True, eq=False)
class FakeDenoiser:
    """The fake score as a denoiser."""

    network: FakeScore
    schedule: NoiseSchedule
    prediction: PredictionType

    def __call__(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The UNet's output (B, C, h, w)."""
        output: Tensor = self.network(x_t, timesteps, conditioning)
        return output


@dataclass(frozen=True, eq=False)
class BottleneckJudge:
    """The head as a discriminator."""

    network: FakeScore
    parameters: Mapping[str, nn.Parameter]
    tensors: Mapping[str, Tensor]

    def __call__(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Logits (B,)."""
        logits: Tensor = self.network(x_t, timesteps, conditioning, judged=True)
        return logits


@dataclass(frozen=True, eq=False)
class Networks:
    """What `DistributionMatching` is made of."""

    teacher: UNetDenoiser
    student: Student
    fake: Student
    judge: BottleneckJudge | None
    as_teacher: Callable[[], AbstractContextManager[None]]
    """While it is open a network that the student shares is the teacher."""

    @classmethod
    def build(
        cls, config: DmdConfig, teacher: Manifest[Teacher], latent_shape: tuple[int, int, int], workspace: Workspace, *, seed: int
    ) -> Self:
        """Load the teacher and make the others of it: all start as it does. A LoRA shares the teacher's network."""
        base = TeacherPipeline.load(workspace.fetch(teacher), workspace.device, only=frozenset({"unet"})).denoiser()
        fake, judge = _fake_score(config, base, latent_shape, workspace, seed=seed)
        as_teacher: Callable[[], AbstractContextManager[None]] = nullcontext
        if config.network == "lora":
            add_lora(base.unet, config.lora_rank, config.lora_alpha, seed=derive_seed(seed, "lora"))
            trained = base
            layers = lora_layers(base.unet)
            as_teacher = lambda: without_lora(layers)  # noqa: E731
        else:
            trained = UNetDenoiser(copy.deepcopy(base.unet), base.schedule, base.prediction)
            base.unet.requires_grad_(False).to(memory_format=torch.channels_last)
            if config.teacher_precision == "bfloat16":
                base.unet.bfloat16()
        ready_for_training(trained.unet, gradient_checkpointing=config.gradient_checkpointing)
        shard(trained.unet, config, workspace.parallel)
        return cls(base, Student.of_unet(trained), fake, judge, as_teacher)


def _fake_score(
    config: DmdConfig, base: UNetDenoiser, latent_shape: tuple[int, int, int], workspace: Workspace, *, seed: int
) -> tuple[Student, BottleneckJudge | None]:
    """A copy of the teacher that is trained whole, with a random head where there is a GAN."""
    unet = ready_for_training(copy.deepcopy(base.unet), gradient_checkpointing=config.gradient_checkpointing)
    head = None if config.gan is None else unet_head(unet, latent_shape, seed=derive_seed(seed, "discriminator"))
    network = shard(FakeScore(unet.requires_grad_(True), head), config, workspace.parallel)
    parameters, tensors = dict(network.named_parameters()), dict(network.named_parameters()) | dict(network.named_buffers())
    own = {name: tensor.detach() for name, tensor in tensors.items() if not name.startswith(_HEAD)}
    trained = {name: parameter for name, parameter in parameters.items() if not name.startswith(_HEAD)}
    fake = Student(FakeDenoiser(network, base.schedule, base.prediction), trained, own)
    if head is None:
        return fake, None
    of_head = {name.removeprefix(_HEAD): parameter for name, parameter in parameters.items() if name.startswith(_HEAD)}
    judge = BottleneckJudge(network, of_head, {name: parameter.detach() for name, parameter in of_head.items()})
    return fake, judge
