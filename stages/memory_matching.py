"""What `dmd` will hold of a device's memory at its peak: the part of `stages.memory_estimate` for its networks and turns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from schemas.dmd import DmdConfig
from stages.diffusion.discriminator import unet_head
from stages.dmd.networks import FakeScore
from stages.meta_memory import Footprint, footprint

if TYPE_CHECKING:
    from stages.memory_estimate import TeacherShape

_FLOAT = 4


@dataclass(frozen=True)
class MatchingMemory:
    """Networks and turns of a distribution matching distillation."""

    fake: FakeScore
    """On the meta device."""
    teacher_bytes: int
    """Zero where a LoRA shares its network."""
    turns: Mapping[str, int]
    """Activations at the peak of each player's turn."""


def matching_memory(shape: "TeacherShape", config: DmdConfig, batch: int) -> MatchingMemory:
    """Estimate the turns of `batch` samples a micro-batch.

    The decoder and VGG of a regression on pictures are not counted: `decoder` names what lies outside, and how large it is is not known here.
    """
    teacher, fake = shape.unet(None), _fake_score(shape, config)
    outputs = batch * (2 if config.regression is not None else 1)
    trained = shape.footprint(config, outputs)
    precision = config.teacher_precision or config.precision
    asked = footprint([teacher], lambda: shape.call(teacher, outputs * (2 if config.guidance_scale > 1 else 1)), precision, backward=False)
    denoised = footprint([fake], lambda: _output(shape, fake, outputs), config.precision)
    student, score = max(trained.peak, trained.held + asked.peak), denoised.peak
    if config.gan is not None:
        judged = _judged(shape, fake, outputs, config.precision, asked=True)
        judging = _judged(shape, fake, outputs + batch, config.precision, asked=False)
        student, score = max(student, trained.held + judged.peak), max(score, denoised.held + judging.peak)
    parameters = sum(parameter.numel() for parameter in teacher.parameters())
    held = 0 if config.network == "lora" else parameters * (2 if config.teacher_precision == "bfloat16" else _FLOAT)
    return MatchingMemory(fake, held, {"student": student, "fake_score": score})


def _fake_score(shape: "TeacherShape", config: DmdConfig) -> FakeScore:
    """On the meta device, as `stages.dmd.networks` makes it."""
    unet = shape.make_unet(None, frozen=False, checkpointed=config.gradient_checkpointing)
    with torch.device("meta"):
        head = None if config.gan is None else unet_head(unet, shape.latent_shape, seed=0)
    return FakeScore(unet, head).train()


def _judged(shape: "TeacherShape", fake: FakeScore, batch: int, precision: str, *, asked: bool) -> Footprint:
    """The head's pass: in the student's turn (`asked`) frozen, with a gradient for its input."""
    fake.requires_grad_(not asked)
    found = footprint([fake], lambda: _output(shape, fake, batch, judged=True, asked=asked), precision)
    fake.requires_grad_(True)
    return found


def _output(shape: "TeacherShape", fake: FakeScore, batch: int, *, judged: bool = False, asked: bool = False) -> Tensor:
    x, t, conditioning = shape.inputs(batch)
    output: Tensor = fake(x.requires_grad_(asked), t, conditioning, judged=judged)
    return output
