"""The composed model as a folder that plain diffusers calls load, held against its LoRAs kept apart before it is handed out."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from torch import Tensor

from infra.store import ArtifactStore
from schemas.base import digest
from schemas.errors import BadInput, RunFailed
from schemas.evaluation import EvaluateConfig
from stages.compose.fusion import save_fused
from stages.compose.grid import draw_weights
from stages.compose.sources import ACCELERATION, Ask, Form, Sources, find_sources
from stages.diffusion.denoiser import UNetDenoiser
from stages.diffusion.lora import merge_lora
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.sampling import make_scheduler, starting_noise
from stages.publish.card import snippet
from stages.publish.export import check_destination, replaced
from stages.publish.variants import COMPOSITION, DESCRIPTION, TEACHER, Composition, Description, TeacherSampling, Variant
from stages.reports.page import card_environment
from stages.students import UNET_FOLDER, save_unet
from stages.teacher import copy_pipeline, pipeline_files, weights_digest

logger = logging.getLogger(__name__)

GRID_FILE = "grid.png"

TOLERANCE = 1e-3
"""Largest difference of a fused variant's output from the adapters', in standard deviations of the output: float32 rounding is a hundredth of it."""


def compose(
    ask: Ask,
    destination: str,
    *,
    store: ArtifactStore | None = None,
    device: str = "cpu",
    prompt: str = "a red apple",
    seed: int = 0,
    grid: bool = False,
) -> Path:
    """Write base + sum of weight x LoRA (LCM-LoRA, arXiv 2311.05556, 3.3) to the folder `destination`; returns it.

    The folder holds the base's pipeline and one variant for each of `ask.forms`, `composed-lora`, `composed-unet`, `composed-adapters`, laid out and
    described as a published model. With `grid` a `grid.png` of `prompt` at several weights, from one noise of `seed`.

    Raises `BadInput` as `find_sources` does, for a destination where something else lies and a grid without a style, all before anything is
    loaded; and `RunFailed` when a fused variant is not the adapters' sum, leaving nothing behind.
    """
    path = check_destination(destination, "--output")
    if grid and not ask.styles:
        raise BadInput("--grid: shows weights of the acceleration against those of a style; expected --style")
    sources = find_sources(ask, store)
    with replaced(path) as folder:
        for _ in copy_pipeline(pipeline_files(sources.base), folder):
            pass
        base_digest = weights_digest(folder)
        pipeline = TeacherPipeline.load(folder, device)
        _load_adapters(pipeline.diffusers(), sources)
        if "lora" in ask.forms:
            save_fused(pipeline.unet, sources.weights, folder / variant_name("lora"))
        if "adapters" in ask.forms:
            _copy_adapters(sources, folder / variant_name("adapters"))
        names, weights = list(sources.weights), list(sources.weights.values())
        pipeline.diffusers().set_adapters(names, adapter_weights=weights)
        apart = _output(pipeline, sources, prompt, seed)
        if grid:
            draw_weights(pipeline.diffusers(), sources, prompt, seed).save(folder / GRID_FILE, optimize=True)
            pipeline.diffusers().set_adapters(names, adapter_weights=weights)
        if "unet" in ask.forms:
            merge_lora(pipeline.unet)
            save_unet(pipeline.unet, folder / variant_name("unet"))
        del pipeline
        agreement = {
            variant_name(form): _agree(form, apart, _output(_reloaded(folder, form, device), sources, prompt, seed))
            for form in ask.forms
            if form != "adapters"
        }
        composition = Composition(base_digest=base_digest, ingredients=sources.ingredients, agreement=agreement)
        _describe(folder, path.name, ask, sources, composition, prompt=prompt, grid=grid)
    logger.info("%s: composed of %s", path, ", ".join(f"{name} x {weight:g}" for name, weight in sources.weights.items()))
    return path


def variant_name(form: Form) -> str:
    """Folder and name of a variant."""
    return f"composed-{form}"


def _load_adapters(pipeline: Any, sources: Sources) -> None:
    for ingredient, file in zip(sources.ingredients, sources.files, strict=True):
        try:
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=ingredient.adapter)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            option = "--acceleration" if ingredient.adapter == ACCELERATION else "--style"
            raise BadInput(f"{option} {ingredient.name}: does not load on the base ({first_line}); expected a LoRA of its UNet") from error
        if ingredient.adapter not in getattr(pipeline.unet, "peft_config", {}):
            raise BadInput(f"{ingredient.name}: changes nothing of the base's UNet; expected a LoRA of its architecture")


def _copy_adapters(sources: Sources, folder: Path) -> None:
    folder.mkdir()
    for ingredient, file in zip(sources.ingredients, sources.files, strict=True):
        shutil.copyfile(file, folder / f"{ingredient.adapter}.safetensors")


def _reloaded(folder: Path, form: Form, device: str) -> TeacherPipeline:
    """The composed model as it lies there, through the calls that its reader makes."""
    variant = folder / variant_name(form)
    pipeline = TeacherPipeline.load(folder, device)
    if form == "lora":
        pipeline.diffusers().load_lora_weights(str(variant))
    else:
        unet_class: Any = diffusers.UNet2DConditionModel
        pipeline.diffusers().unet = unet_class.from_pretrained(variant, subfolder=UNET_FOLDER, use_safetensors=True).to(device).eval()
    return pipeline


@torch.no_grad()
def _output(pipeline: TeacherPipeline, sources: Sources, prompt: str, seed: int) -> Tensor:
    """The UNet's output (B, C, h, w) at noise of `seed`, at the first and the last timestep of the longest grid."""
    grid = sources.sampling.timesteps[sources.sampling.steps[0]]
    timesteps = torch.tensor(sorted({grid[0], grid[-1]}), device=pipeline.device)
    noise = torch.cat([starting_noise(seed, index, pipeline.latent_shape) for index in range(len(timesteps))]).to(pipeline.device)
    denoiser = UNetDenoiser(pipeline.unet, pipeline.schedule, pipeline.prediction)
    return denoiser(noise, timesteps, pipeline.conditioning([prompt] * len(timesteps)))


def _agree(form: Form, apart: Tensor, fused: Tensor) -> float:
    """How far the fused output is from that of the adapters kept apart, in standard deviations. Raises `RunFailed` beyond the tolerance."""
    difference = float((apart - fused).abs().max() / apart.std())
    if not difference <= TOLERANCE:  # NaN too
        raise RunFailed(
            f"{variant_name(form)}: its output differs from that of the LoRAs kept apart by {difference:.2g} standard deviations; "
            f"expected at most {TOLERANCE:g}. Nothing was written"
        )
    return difference


def _describe(folder: Path, name: str, ask: Ask, sources: Sources, composition: Composition, *, prompt: str, grid: bool) -> None:
    """Write schedulers, `distillery.json`, `composition.json` and the card."""
    facts, sampling = sources.facts, sources.sampling
    guidance_scale: float = EvaluateConfig.model_fields["teacher_guidance_scale"].default
    steps: int = EvaluateConfig.model_fields["teacher_steps"].default[0]
    of_base = make_scheduler("trailing", facts.scheduler_config, facts.prediction_type)
    of_base.save_pretrained(folder / TEACHER / "scheduler")
    identity = digest(composition.model_dump(mode="json", include={"base_digest", "ingredients"}))
    variants = {}
    for form in ask.forms:
        sources.scheduler.save_pretrained(folder / variant_name(form) / "scheduler")
        variants[variant_name(form)] = Variant(
            kind=form,
            steps=sampling.steps,
            timesteps=sampling.timesteps,
            sampler=sampling.sampler,
            scheduler=type(sources.scheduler).__name__,
            prediction_type=sampling.prediction_type,
            guidance_scale=sampling.guidance_scale,
            method=sampling.method,
            node="compose",
            identity=identity,
        )
    description = Description(
        name=name,
        pipeline=facts.architecture,
        resolution=facts.resolution,
        complete=True,
        teacher=TeacherSampling(scheduler=type(of_base).__name__, steps=steps, guidance_scale=guidance_scale),
        variants=variants,
    )
    (folder / DESCRIPTION).write_text(description.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (folder / COMPOSITION).write_text(composition.model_dump_json(indent=1) + "\n", encoding="utf-8")
    snippets = {known: snippet(description, known, variant, prompt, sources.weights) for known, variant in variants.items()}
    (folder / "README.md").write_text(_card(description, composition, snippets, grid=grid), encoding="utf-8")


def _card(description: Description, composition: Composition, snippets: Mapping[str, str], *, grid: bool) -> str:
    return (
        card_environment("stages.compose")
        .get_template("card.md.j2")
        .render(description=description, composition=composition, snippets=snippets, grid=grid)
    )
