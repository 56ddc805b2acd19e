"""What a student in training will hold of a device's memory at its peak, told before anything runs, from the teacher's configuration files alone."""

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infra.outside import local_copy
from infra.store import ArtifactStore
from schemas.data import EncodeConfig
from schemas.dmd import DmdConfig
from schemas.errors import BadInput
from schemas.finetune import FinetuneConfig
from schemas.lcm import LcmConfig
from schemas.lightning import LinkConfig
from schemas.manifest import Manifest
from schemas.teacher import TrainTeacherConfig
from stages.diffusion.conditioning import Conditioning, blank_text
from stages.diffusion.denoiser import unet_output
from stages.diffusion.discriminator import Discriminator, DiscriminatorHead, UNetEncoder
from stages.diffusion.guidance import add_guidance_input
from stages.diffusion.lora import lora_config
from stages.diffusion.lora_merged import merge_in_training
from stages.encoded_size import CONFIG_FILES, human
from stages.memory_matching import matching_memory
from stages.meta_memory import Footprint, footprint
from stages.plan import Plan
from stages.train_teacher.networks import build_autoencoder, build_unet
from stages.training.sharding import UNITS

Trained = LinkConfig | LcmConfig | FinetuneConfig | DmdConfig
"""Sections whose training is estimated."""

_FLOAT = 4
_MOMENTS = 2
_PER_SAMPLE = 3
"""Latents that a prepared sample holds: x_t, the teacher's result, and the noise it is judged with."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of one stage run, on each device. The CUDA context, workspaces and fragmentation come on top."""

    processes: int
    parts: Mapping[str, int]
    """By what holds them, for the turn that takes most."""

    @property
    def peak(self) -> int:
        """Of everything together."""
        return sum(self.parts.values())

    def as_json(self) -> dict[str, Any]:
        """For `distill plan --json`."""
        return {"processes": self.processes, "peak_bytes": self.peak, **{f"{name}_bytes": size for name, size in self.parts.items()}}


def memory_estimates(plan: Plan, find: Callable[[str], Manifest | None], store: ArtifactStore) -> dict[str, MemoryEstimate] | None:
    """Estimate the runs that train a UNet of the teacher's and are not finished; None where the teacher's configuration files are not to be had."""
    wanted = {node.name: node.config for node in plan.nodes if isinstance(node.config, Trained) and find(node.name) is None}
    try:
        teacher = _teacher(plan, find, store) if wanted else None
        return {name: teacher.estimate(config) for name, config in wanted.items()} if teacher is not None else {}
    except (
        BadInput,
        OSError,
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
    ):  # nothing to plan is wrong with it: the stages will say what is
        return None


def sentence(estimates: Mapping[str, MemoryEstimate] | None) -> str:
    """Say for people which run takes most, and what of it lies where; nothing where no training is left."""
    if estimates is None:
        return "memory: of training is known once the teacher's configuration files are here: run distill stage teacher"
    if not estimates:
        return ""
    name, most = max(estimates.items(), key=lambda item: item[1].peak)
    parts = ", ".join(f"{part} {human(size)}" for part, size in most.parts.items() if size)
    return (
        f"memory: at most {human(most.peak)} of tensors on each of {most.processes} devices, in {name} ({parts}); the CUDA context, workspaces "
        "and fragmentation come on top"
    ).replace("each of 1 devices", "one device")


def _teacher(plan: Plan, find: Callable[[str], Manifest | None], store: ArtifactStore) -> "TeacherShape":
    recipe = plan.recipe
    found = find("teacher" if recipe.teacher is not None else "train-teacher")
    if found is not None:
        there = {entry.path for entry in found.files}
        return TeacherShape.read(store.fetch(found, [path for path in CONFIG_FILES if path in there]), recipe.encode)
    if recipe.teacher is None:
        assert recipe.train_teacher is not None, "the recipe's own check"
        return TeacherShape.of_trained(recipe.train_teacher, recipe.encode)
    with tempfile.TemporaryDirectory() as folder:
        return TeacherShape.read(local_copy(recipe.teacher.address, Path(folder), lambda path: path in CONFIG_FILES), recipe.encode)


@dataclass(frozen=True, eq=False)
class TeacherShape:
    """A teacher's UNet and VAE, and the sizes of what goes into them."""

    unet_config: Mapping[str, Any]
    vae_config: Mapping[str, Any]
    latent_shape: tuple[int, int, int]
    tokens: int
    _cache: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, config: EncodeConfig) -> "TeacherShape":
        """Of a pipeline folder."""
        unet, vae = (json.loads((folder / name / "config.json").read_text(encoding="utf-8")) for name in ("unet", "vae"))
        tokenizer = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
        downscale = 2 ** (len(vae["block_out_channels"]) - 1)
        side = config.resolution_px // downscale if config.resolution_px is not None else int(unet["sample_size"])
        return cls(unet, vae, (int(unet["in_channels"]), side, side), int(tokenizer["model_max_length"]))

    @classmethod
    def of_trained(cls, teacher: TrainTeacherConfig, config: EncodeConfig) -> "TeacherShape":
        """Of a teacher that is yet to be trained."""
        downscale = 2 ** (len(teacher.autoencoder.block_out_channels) - 1)
        channels, side = teacher.autoencoder.latent_channels, teacher.resolution_px // downscale
        with torch.device("meta"):
            unet = build_unet(teacher.unet, latent_channels=channels, latent_side=side, text=teacher.text_encoders)
            vae = build_autoencoder(teacher.autoencoder, teacher.resolution_px)
        side = side if config.resolution_px is None else config.resolution_px // downscale
        return cls(dict(unet.config), dict(vae.config), (channels, side, side), teacher.max_tokens)

    def estimate(self, config: Trained) -> MemoryEstimate:
        """Estimate one run."""
        processes = config.world_size or torch.cuda.device_count() or 1
        batch = math.ceil(config.batch_size / (processes * config.accumulation_steps))
        student = _Network.of(self.unet(config))
        parts = {"teacher": 0, "student": student.weights, "discriminator": 0, "optimizer": _MOMENTS * student.trained}
        whole = isinstance(config, LcmConfig) and config.network == "unet"
        parts["average"] = student.trained if whole or config.ema_decay is not None else 0
        parts["batches"] = config.accumulation_steps * batch * self._sample_bytes()
        trained = self.footprint(config, batch)
        turns = {"student": (student.trained, trained.peak)}
        networks = [student] * (2 if whole else 1)
        asked = not isinstance(config, LcmConfig) or config.solver == "ddim"
        if whole and asked:
            parts["teacher"] = _Network.of(self.unet(None)).weights
        if isinstance(config, LinkConfig):
            parts["teacher"] = _Network.of(self.unet(None)).count * (2 if config.teacher_precision == "bfloat16" else _FLOAT)
            if config.adversarial is not None:
                conditional = config.adversarial.conditional
                discriminator = _Network.of(self.discriminator(conditional, config.gradient_checkpointing))
                parts["discriminator"] = discriminator.weights
                parts["optimizer"] += _MOMENTS * discriminator.trained
                judged = self.judged(config, batch)
                turns["student"] = (student.trained, max(trained.peak, trained.held + judged.peak))
                turns["discriminator"] = (discriminator.trained, self.judging(config, batch).peak)
                networks.append(discriminator)
        if isinstance(config, DmdConfig):
            matching = matching_memory(self, config, batch)
            fake = _Network.of(matching.fake)
            parts |= {"teacher": matching.teacher_bytes, "fake_score": matching.fake_bytes}
            parts["batches"] *= matching.batches
            parts["distance"] = matching.distance_bytes
            parts["optimizer"] += _MOMENTS * fake.trained
            turns = {name: (fake.trained if name == "fake_score" else student.trained, peak) for name, peak in matching.turns.items()}
            networks.append(fake)
        elif not isinstance(config, FinetuneConfig):  # there nobody teaches
            guided = isinstance(config, LcmConfig) or config.guidance_scale > 1
            turns["teacher"] = (0, self.asked(config, 2 * batch if guided and asked else batch).peak)
        gradients, activations = max(turns.values(), key=sum)
        parts |= {"gradients": gradients, "activations": activations}
        if processes > 1 and config.sharding != "none":
            divided = {"optimizer"}
            if config.sharding == "full":
                divided |= {"student", "discriminator", "fake_score", "average"}
                if config.accumulation_steps == 1:  # with more they are reduced, and divided, after the last part of a batch only
                    divided |= {"gradients"}
            parts |= {name: math.ceil(size / processes) for name, size in parts.items() if name in divided}
            if config.sharding == "full":
                parts["gathered"] = sum(network.gathered for network in networks)
        return MemoryEstimate(processes, parts)

    def _sample_bytes(self) -> int:
        _, _, conditioning = self.inputs(1)
        text = sum(t.numel() for t in (conditioning.prompt_embeds, conditioning.pooled, conditioning.time_ids) if t is not None)
        return _FLOAT * (_PER_SAMPLE * math.prod(self.latent_shape) + text)

    # Networks and passes, each made once however many runs share it.
    def unet(self, config: Trained | None) -> Any:
        """The student's UNet on the meta device; the teacher's for None."""
        rank = config.lora_rank if config is not None and config.network == "lora" else None
        checkpointed = config is not None and config.gradient_checkpointing
        told = isinstance(config, LcmConfig) and config.guidance_w_range is not None
        merged = rank is not None and config is not None and config.precision == "float32"
        return self._once(
            ("unet", config is None, rank, checkpointed, told, merged),
            lambda: self.make_unet(rank, frozen=config is None, checkpointed=checkpointed, told=told, merged=merged),
        )

    def make_unet(self, rank: int | None, *, frozen: bool, checkpointed: bool, told: bool = False, merged: bool = False) -> Any:
        """A UNet on the meta device, with a LoRA of a rank, which may be `merged` in training, and with w as an input where it is `told`."""
        import diffusers  # noqa: PLC0415 - `stages.diffusion` must come first

        with torch.device("meta"):
            kind: Any = diffusers.UNet2DConditionModel
            unet = kind.from_config(dict(self.unet_config))
            if told:
                add_guidance_input(unet)
            if rank is not None:
                unet.add_adapter(lora_config(rank, rank))
        if merged:
            merge_in_training(unet)
        if frozen:
            return unet.requires_grad_(False).eval()
        if checkpointed:
            unet.enable_gradient_checkpointing()
        return unet.train()

    def discriminator(self, conditional: bool, checkpointed: bool) -> Any:
        """As `unet_discriminator` makes it."""

        def make() -> Any:
            encoder = UNetEncoder(self.make_unet(None, frozen=False, checkpointed=checkpointed))
            height, width = (-(-side // encoder.downscale) for side in self.latent_shape[1:])
            with torch.device("meta"):
                head = DiscriminatorHead(encoder.channels * (2 if conditional else 1), height, width, encoder.channels)
            return Discriminator(encoder, head, conditional=conditional).train()

        return self._once(("discriminator", conditional, checkpointed), make)

    def footprint(self, config: Trained, batch: int) -> Footprint:
        """The student's forward and backward pass."""
        unet = self.unet(config)
        return self._pass((id(unet), batch, config.precision), [unet], lambda: self.call(unet, batch), config.precision)

    def asked(self, config: LinkConfig | LcmConfig, batch: int) -> Footprint:
        """The teacher's forward pass."""
        unet = self.unet(None)
        low = isinstance(config, LinkConfig) and config.teacher_precision == "bfloat16"
        precision = "bfloat16" if low else config.precision
        key = (id(unet), batch, precision)
        return self._pass(key, [unet], lambda: self.call(unet, batch), precision, backward=False)

    def judging(self, config: LinkConfig, batch: int) -> Footprint:
        """The discriminator's own turn: real and fake in one pass."""
        assert config.adversarial is not None
        network = self.discriminator(config.adversarial.conditional, config.gradient_checkpointing).requires_grad_(True)
        key = (id(network), batch, config.precision, "judging")
        return self._pass(key, [network], lambda: self._judge(network, 2 * batch), config.precision)

    def judged(self, config: LinkConfig, batch: int) -> Footprint:
        """The discriminator in the student's turn: frozen, with a gradient for its input."""
        assert config.adversarial is not None
        network = self.discriminator(config.adversarial.conditional, config.gradient_checkpointing).requires_grad_(False)
        key = (id(network), batch, config.precision, "judged")
        found = self._pass(key, [network], lambda: self._judge(network, batch, asked=True), config.precision)
        network.requires_grad_(True)
        return found

    def call(self, unet: Any, batch: int) -> Tensor:
        """A UNet's forward pass."""
        x, t, conditioning = self.inputs(batch)
        conditioning = conditioning.with_guidance(torch.empty(batch, device="meta"))
        return unet_output(unet, x, t, conditioning)

    def _judge(self, discriminator: Any, batch: int, *, asked: bool = False) -> Tensor:
        x, t, conditioning = self.inputs(batch)
        logits: Tensor = discriminator(x.requires_grad_(asked), t, x.detach(), t, conditioning)
        return logits

    def inputs(self, batch: int) -> tuple[Tensor, Tensor, Conditioning]:
        """x_t, timesteps and conditioning on the meta device."""
        with torch.device("meta"):
            x, t = torch.empty(batch, *self.latent_shape), torch.empty(batch, dtype=torch.long)
            text = blank_text(self.unet_config, self.tokens, batch)
            return x, t, text if text.pooled is None else text.with_time_ids(torch.empty(batch, 6))

    def _pass(
        self, key: tuple[Any, ...], networks: list[Any], run: Callable[[], Tensor], precision: str, *, backward: bool = True
    ) -> Footprint:
        found: Footprint = self._once(key, lambda: footprint(networks, run, precision, backward=backward))
        return found

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


@dataclass(frozen=True)
class _Network:
    """Bytes of a network in training, float32."""

    count: int
    trained: int
    gathered: int
    """What FSDP2 has gathered at most: what lies outside of units and its gradients; of units the one that runs, its gradients, and the next one."""

    @property
    def weights(self) -> int:
        """Of all parameters."""
        return _FLOAT * self.count

    @classmethod
    def of(cls, network: nn.Module) -> "_Network":
        """Count a network of the meta device."""
        count = sum(parameter.numel() for parameter in network.parameters())
        units = [sum(p.numel() for p in module.parameters()) for module in network.modules() if type(module).__name__ in UNITS]
        trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        return cls(count, _FLOAT * trained, _FLOAT * (2 * (count - sum(units)) + 3 * max(units, default=0)))
