"""Stage `finetune`: plain diffusion training of a teacher's UNet on an encoded set, to a style LoRA or to another base (DDPM, arXiv 2006.11239)."""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from schemas.base import Model
from schemas.errors import BadInput
from schemas.finetune import FinetuneConfig
from schemas.manifest import FinetunedLoRA, Latents, Manifest, Teacher
from stages.denoising import min_snr_weight, stratified_timesteps
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.lora import add_lora, save_lora
from stages.diffusion.pipeline import TeacherPipeline
from stages.latents import LatentSet
from stages.students import METRICS_FILE, UNET_FOLDER, Student, check_teacher, ready_for_training, save_unet
from stages.teacher import describe, pipeline_files
from stages.training import Draw, Figure, Method, Player, Spread, train, write_metrics
from stages.training.latent_batches import LatentBatch, reader
from stages.training.randomness import derive_seed
from stages.training.sharding import shard, whole_network
from stages.watching import Training, save_report
from stages.workspace import Workspace


class Inputs(Model):
    """What the stage reads."""

    teacher: Manifest[Teacher]
    latents: Manifest[Latents]


def run(config: FinetuneConfig, inputs: Inputs, workspace: Workspace) -> Manifest[Any]:
    """Train, and publish the adapter, or a copy of the teacher with the trained UNet in the place of its own.

    Raises `BadInput` for latents of another teacher, and when no caption is chosen, before training.
    """
    check_teacher(inputs.teacher, inputs.latents)
    seed = workspace.seed if config.seed is None else config.seed
    latents = LatentSet.open(inputs.latents, workspace, inputs.teacher)
    chosen = ChosenSet(latents, chosen_by_caption(latents, config.captions))
    source = workspace.fetch(inputs.teacher)
    denoiser = TeacherPipeline.load(source, workspace.device, only=frozenset({"unet"})).denoiser()
    if config.network == "lora":
        add_lora(denoiser.unet, config.lora_rank, config.lora_alpha, seed=derive_seed(seed, "lora"))
    ready_for_training(denoiser.unet, gradient_checkpointing=config.gradient_checkpointing)
    shard(denoiser.unet, config, workspace.parallel)
    method = Denoising(config, Student.of_unet(denoiser), unconditional=latents.unconditional(1))
    rows = train(method, reader(chosen), len(chosen), config, workspace, seed=seed)

    content: FinetunedLoRA | Teacher = FinetunedLoRA(
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        samples=len(chosen),
        training_steps=config.training_steps,
        teacher=inputs.teacher.identity,
    )
    with workspace.folder("finetuned") as folder:
        unet = whole_network(denoiser.unet, workspace.parallel)
        if workspace.parallel.leads:
            if config.network == "lora":
                save_lora(unet, folder)
            else:
                content = save_base(unet, source, folder)
            write_metrics(rows, folder / METRICS_FILE)
            save_report(folder, Training(content, rows, config, workspace.lineage))
        return workspace.publish(folder, content)


def save_base(unet: Any, teacher: Path, folder: Path) -> Teacher:
    """Write the teacher's pipeline with this UNet, in float32, in the place of its own, and say what it is."""
    for name, path in pipeline_files(teacher).items():
        if not name.startswith(f"{UNET_FOLDER}/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
    save_unet(unet, folder)
    return describe(folder)


def chosen_by_caption(latents: LatentSet, pattern: str | None) -> Sequence[int]:
    """Samples whose caption the pattern is found in, case ignored; all without one. Raises `BadInput` where there are none."""
    if pattern is None:
        return range(len(latents))
    expression = re.compile(pattern, re.IGNORECASE)
    found = [number for number, caption in enumerate(latents.captions.to_pylist()) if expression.search(caption)]
    if not found:
        raise BadInput(f"finetune captions {pattern!r}: found in none of the {len(latents)} encoded captions; expected it in some")
    return found


@dataclass(frozen=True, eq=False)
class ChosenSet:
    """Some samples of an encoded set."""

    latents: LatentSet
    chosen: Sequence[int]
    """Their indices in the whole set."""

    def __len__(self) -> int:
        return len(self.chosen)

    def samples(self, indices: Sequence[int]) -> tuple[Tensor, Conditioning]:
        """Latents (B, C, h, w) and their conditioning."""
        return self.latents.samples([self.chosen[index] for index in indices])


@dataclass(frozen=True, eq=False)
class NoisySample:
    """A prepared micro-batch."""

    x_t: Tensor
    """(B, C, h, w)."""
    timesteps: Tensor
    """(B,) long."""
    conditioning: Conditioning
    """The captions', or of no text where they are dropped."""
    target: Tensor
    """(B, C, h, w): the output that says x0 and the noise."""
    weight: Tensor
    """(B,) of the squared error."""
    reference: Spread
    """Of the encoded pictures, whose mean given x_t a perfect x0 is."""


class Denoising(Method[LatentBatch, NoisySample]):
    """w(t) norm(f(x_t, t, c) - target)^2, the target what the network's own prediction type makes of x0 and the noise; t uniform in 0..T-1."""

    def __init__(self, config: FinetuneConfig, student: Student, *, unconditional: Conditioning) -> None:
        """`unconditional` (1, ...) takes the place of dropped captions."""
        self.config, self.denoiser, self.unconditional = config, student.denoiser, unconditional
        self.players = {"student": Player.of(student.parameters, config.optimizer, config)}
        self._tensors = student.tensors

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """What is trained: the UNet, or its LoRA."""
        return {"student": self._tensors}

    def prepare(self, batch: LatentBatch, draw: Draw) -> NoisySample:
        """Noise each sample to a timestep of its own, and drop some captions."""
        batch = batch.to(draw.device)
        schedule, prediction = self.denoiser.schedule, self.denoiser.prediction
        eps = draw.normal("eps", batch.latents.shape[1:])
        timesteps = stratified_timesteps(draw, self.config.batch_size, schedule.num_train_timesteps)
        alpha, sigma = schedule.alpha_sigma(timesteps, batch.latents.ndim)
        keep = draw.uniform("caption") >= self.config.caption_dropout
        return NoisySample(
            x_t=schedule.add_noise(batch.latents, eps, timesteps),
            timesteps=timesteps,
            conditioning=batch.conditioning.where(keep, self.unconditional.to(draw.device).expand(len(keep))),
            target=prediction.from_x0_eps(batch.latents, eps, alpha, sigma),
            weight=min_snr_weight(alpha.flatten() ** 2 / sigma.flatten() ** 2, self.config.snr_gamma, prediction.name),
            reference=Spread.of(batch.latents),
        )

    def loss(self, player: str, prepared: NoisySample, draw: Draw) -> Mapping[str, Figure]:  # noqa: ARG002
        """Return the weighted squared error of the prediction, and the error unweighted."""
        x_t, timesteps = prepared.x_t, prepared.timesteps
        output = self.denoiser(x_t, timesteps, prepared.conditioning).to(torch.promote_types(x_t.dtype, torch.float32))
        error = (output - prepared.target).square().flatten(1).mean(1)
        x0 = self.denoiser.prediction.to_x0(output.detach(), x_t, *self.denoiser.schedule.alpha_sigma(timesteps, x_t.ndim))
        return {"loss": (prepared.weight * error).mean(), "mse": error.mean(), "x0": Spread.of(x0), "reference": prepared.reference}
