"""What `dmd` will hold of a device's memory at its peak: the part of `stages.memory_estimate` for its networks and turns."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from infra.outside import on_this_machine
from schemas.dmd import DmdConfig
from stages.diffusion.discriminator import unet_head
from stages.dmd.decoding import DecodedDistance, decoder
from stages.dmd.networks import FakeScore
from stages.meta_memory import Footprint, footprint
from stages.perceptual import outline

if TYPE_CHECKING:
    from stages.memory_estimate import TeacherShape

_FLOAT = 4


@dataclass(frozen=True)
class MatchingMemory:
    """Networks and turns of a distribution matching distillation."""

    fake: FakeScore
    """On the meta device."""
    fake_bytes: int
    """Of its own weights: those of an adapter and the head where the rest is the teacher's."""
    teacher_bytes: int
    """Zero where the student, a LoRA, is put on its network."""
    turns: Mapping[str, int]
    """Activations at the peak of each player's turn."""
    distance_bytes: int
    """Weights of what decodes outputs and compares pictures."""
    batches: int
    """That are on the device in a step."""


def matching_memory(shape: "TeacherShape", config: DmdConfig, batch: int) -> MatchingMemory:
    """Estimate the turns of `batch` samples a micro-batch."""
    teacher, fake = shape.unet(None), _fake_score(shape, config)
    outputs = batch * (2 if config.regression is not None else 1)
    trained = shape.footprint(config, outputs)
    precision = config.teacher_precision or config.precision
    asked = footprint([teacher], lambda: shape.call(teacher, outputs * (2 if config.guidance_scale > 1 else 1)), precision, backward=False)
    denoised = footprint([fake], lambda: _output(shape, fake, outputs), config.precision)
    distance_bytes, compared = _compared(shape, config, batch)
    student, score = max(trained.peak, trained.held + asked.peak, trained.held + compared.peak), denoised.peak
    if config.gan is not None:
        judged = _judged(shape, fake, outputs, config.precision, asked=True)
        judging = _judged(shape, fake, outputs + batch, config.precision, asked=False)
        student, score = max(student, trained.held + compared.held + judged.peak), max(score, denoised.held + judging.peak)
    parameters = sum(parameter.numel() for parameter in teacher.parameters())
    held = 0 if config.network == "lora" else parameters * (2 if config.teacher_precision == "bfloat16" else _FLOAT)
    own = sum(parameter.numel() for parameter in fake.parameters() if config.fake_network == "unet" or parameter.requires_grad)
    turns = {"student": student, "fake_score": score}
    return MatchingMemory(fake, _FLOAT * own, held, turns, distance_bytes, config.fake_updates if config.follows else 1)


def _compared(shape: "TeacherShape", config: DmdConfig, batch: int) -> tuple[int, Footprint]:
    """Bytes of the networks that a regression on pictures takes, and its pass: nothing where latents are compared."""
    if config.regression is None or config.regression.distance == "l2":
        return 0, Footprint(0, 0)
    network, distance = _decoder(shape, config.regression.decoder), outline(config.regression)
    compare = DecodedDistance(decoder(network, gradient_checkpointing=config.gradient_checkpointing), distance)
    x, reference = (torch.empty(batch, *shape.latent_shape, device="meta") for _ in range(2))
    found = footprint([network, distance], lambda: compare(x.requires_grad_(True), reference), config.precision)
    return sum(tensor.numel() * tensor.element_size() for part in (network, distance) for tensor in part.parameters()), found


def _decoder(shape: "TeacherShape", tiny: str | None) -> Any:
    """The teacher's VAE, or a tiny decoder, on the meta device: as its configuration says where it lies on this machine, or else TAESD's, which
    diffusers has for its default."""
    import diffusers  # noqa: PLC0415 - `stages.diffusion` must come first

    kind: Any = diffusers.AutoencoderKL if tiny is None else diffusers.AutoencoderTiny
    described = dict(shape.vae_config)
    if tiny is not None:
        path = on_this_machine(f"{tiny}/config.json")
        described = {"latent_channels": shape.latent_shape[0]} if path is None else json.loads(path.read_text(encoding="utf-8"))
    with torch.device("meta"):
        return kind.from_config(described).eval()


def _fake_score(shape: "TeacherShape", config: DmdConfig) -> FakeScore:
    """On the meta device, as `stages.dmd.networks` makes it."""
    rank = config.lora_rank if config.fake_network == "lora" else None
    merged = rank is not None and config.precision == "float32"
    unet = shape.make_unet(rank, frozen=False, checkpointed=config.gradient_checkpointing, merged=merged)
    with torch.device("meta"):
        head = None if config.gan is None else unet_head(unet, shape.latent_shape, seed=0)
    return FakeScore(unet, head).train()


def _judged(shape: "TeacherShape", fake: FakeScore, batch: int, precision: str, *, asked: bool) -> Footprint:
    """The head's pass: in the student's turn (`asked`) frozen, with a gradient for its input."""
    trained = [parameter for parameter in fake.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(not asked)
    found = footprint([fake], lambda: _output(shape, fake, batch, judged=True, asked=asked), precision)
    for parameter in trained:
        parameter.requires_grad_(True)
    return found


def _output(shape: "TeacherShape", fake: FakeScore, batch: int, *, judged: bool = False, asked: bool = False) -> Tensor:
    x, t, conditioning = shape.inputs(batch)
    output: Tensor = fake(x.requires_grad_(asked), t, conditioning, judged=judged)
    return output
