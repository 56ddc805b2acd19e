"""The networks of a distribution matching distillation: teacher, student, fake score and the head on it."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from schemas.dmd import DmdConfig
from schemas.manifest import Manifest, Teacher
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.denoiser import UNetDenoiser, unet_output
from stages.diffusion.discriminator import encoder_features, unet_head
from stages.diffusion.lora import add_lora, checkpoint_under_adapter, load_lora_state, lora_layers, read_lora, under, without_lora
from stages.diffusion.pipeline import TeacherPipeline, load_unet
from stages.diffusion.prediction import PredictionType
from stages.diffusion.schedule import NoiseSchedule
from stages.start import fetch_start
from stages.students import Student, ready_for_training
from stages.training.randomness import derive_seed
from stages.training.sharding import shard
from stages.workspace import Workspace

FAKE_ADAPTER: Final = "fake_score"
"""The adapter on the teacher's network that is the fake score."""

_HEAD = "head."


class FakeScore(nn.Module):
    """A UNet that follows the student's distribution, and where there is a GAN a head on its mid block (DMD2 4.3).

    One module for both: divided over processes (FSDP2), its weights are gathered when it is called, and its parts must not be called alone.
    """

    def __init__(self, unet: Any, head: nn.Module | None, shared: Sequence[Any] = ()) -> None:
        """`shared`: the layers of a UNet that is the fake score under its own adapter only, and other networks at other times."""
        super().__init__()
        self.unet, self.head, self._shared = unet, head, list(shared)

    def forward(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, *, judged: bool = False) -> Tensor:
        """The UNet's output (B, C, h, w), or logits (B,) of being real."""
        with under(self._shared, FAKE_ADAPTER):
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
    """While it is open a network that the student or the fake score shares is the teacher."""

    @classmethod
    def build(
        cls, config: DmdConfig, teacher: Manifest[Teacher], latent_shape: tuple[int, int, int], workspace: Workspace, *, seed: int
    ) -> Self:
        """Load the teacher and make the others of it: all start as it does, but for a student that goes on from another.

        LoRAs share the teacher's network; at rest it is the student's.
        """
        folder = workspace.fetch(teacher)
        start = fetch_start(config, folder, workspace)
        base = TeacherPipeline.load(folder, workspace.device, only=frozenset({"unet"})).denoiser()
        trained = base
        if config.network == "unet":
            own: Any = copy.deepcopy(base.unet) if start is None else load_unet(start).to(workspace.device)
            trained = UNetDenoiser(own, base.schedule, base.prediction)
        fake = _fake_copy(base, config) if config.fake_network == "unet" else None
        if fake is None:
            add_lora(base.unet, config.lora_rank, config.lora_alpha, seed=derive_seed(seed, "fake-lora"), adapter=FAKE_ADAPTER)
        if config.network == "lora":
            add_lora(base.unet, config.lora_rank, config.lora_alpha, seed=derive_seed(seed, "lora"))
            if start is not None:
                load_lora_state(base.unet, read_lora(start)[2])
        layers = lora_layers(base.unet)
        if layers:
            ready_for_training(base.unet, gradient_checkpointing=config.gradient_checkpointing)
            if fake is None and config.gradient_checkpointing:
                base.unet.enable_gradient_checkpointing(checkpoint_under_adapter)
        else:
            base.unet.requires_grad_(False).to(memory_format=torch.channels_last)
            if config.teacher_precision == "bfloat16":
                base.unet.bfloat16()
        if trained is not base:
            ready_for_training(trained.unet, gradient_checkpointing=config.gradient_checkpointing)
        shard(trained.unet, config, workspace.parallel)
        student = Student.of_unet(trained)
        followed, judge = _fake_score(config, base, fake, latent_shape, workspace, seed=seed)
        return cls(base, student, followed, judge, lambda: without_lora(layers))


def _fake_copy(base: UNetDenoiser, config: DmdConfig) -> Any:
    """A copy of the teacher that is trained whole."""
    unet = ready_for_training(copy.deepcopy(base.unet), gradient_checkpointing=config.gradient_checkpointing)
    return unet.requires_grad_(True)


def _fake_score(
    config: DmdConfig, base: UNetDenoiser, unet: Any, latent_shape: tuple[int, int, int], workspace: Workspace, *, seed: int
) -> tuple[Student, BottleneckJudge | None]:
    """The fake score, of a UNet of its own or for None of an adapter on the teacher's, with a random head where there is a GAN."""
    head = None if config.gan is None else unet_head(base.unet, latent_shape, seed=derive_seed(seed, "discriminator"))
    apart = unet is not None
    network = shard(FakeScore(unet, head), config, workspace.parallel) if apart else FakeScore(base.unet, head, lora_layers(base.unet))
    parameters, buffers = dict(network.named_parameters()), dict(network.named_buffers()) if apart else {}
    trained = {
        name: parameter for name, parameter in parameters.items() if not name.startswith(_HEAD) and (apart or f".{FAKE_ADAPTER}." in name)
    }
    own = {name: tensor.detach() for name, tensor in (trained | buffers).items() if not name.startswith(_HEAD)}
    fake = Student(FakeDenoiser(network, base.schedule, base.prediction), trained, own)
    if head is None:
        return fake, None
    of_head = {name.removeprefix(_HEAD): parameter for name, parameter in parameters.items() if name.startswith(_HEAD)}
    judge = BottleneckJudge(network, of_head, {name: parameter.detach() for name, parameter in of_head.items()})
    return fake, judge
