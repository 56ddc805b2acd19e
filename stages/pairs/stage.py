"""The stage `pairs`: noise and what the deterministic teacher makes of it (DMD, arXiv 2311.18828, 3.3), in shards kept one by one."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import torch

from infra.progress import NullProgress
from schemas.base import Model
from schemas.manifest import Latents, Manifest, Pairs, Teacher
from schemas.pairs import PairsConfig
from schemas.recipe import Recipe
from stages.diffusion.facts import TeacherFacts, inspect
from stages.diffusion.sampling import check_sampler
from stages.fitting import fitted_once
from stages.kept_shards import processes_for_shards, publish_shards, shards_left
from stages.pairs.shard import INDEX_SCHEMA, Work, captions_of, draw_shard, loaded_drawer, shard_name, unload_drawer
from stages.parallel import devices_of, map_processes
from stages.students import check_teacher
from stages.workspace import Workspace

logger = logging.getLogger(__name__)

_ON_A_CPU: Final = 16
"""Pairs drawn together where the recipe leaves it open: a CPU gains nothing by more."""
_TRIED: Final = 64
"""On a device whose memory is tried first: no GPU of today gains by more, guided ones being 128 samples."""


class Inputs(Model):
    """What `pairs` reads."""

    teacher: Manifest[Teacher]
    latents: Manifest[Latents]
    """Whose captions, and size, the pairs have."""


def preflight(config: PairsConfig, _outside: Mapping[str, str], recipe: Recipe) -> None:
    """Hold the sampler against a teacher that lies on this machine. Raises `BadInput`."""
    if recipe.teacher is None:
        return
    folder = Path(recipe.teacher.address.removeprefix("file://"))
    if folder.is_dir() and recipe.teacher.variant is None:
        _check(config, inspect(folder))


def run(config: PairsConfig, inputs: Inputs, workspace: Workspace) -> Manifest[Pairs]:
    """Make the artifact `pairs`. Raises `BadInput` for latents of another teacher and for a sampler that cannot take it, before anything is drawn.

    On this machine's disk lie the teacher, one shard for each process, and the shards of the encoded set that hold its captions' text.
    """
    check_teacher(inputs.teacher, inputs.latents)
    facts = inspect(workspace.fetch(inputs.teacher))
    _check(config, facts)
    work = Work(
        content=_content(config, inputs, facts, workspace),
        teacher=inputs.teacher,
        latents=inputs.latents,
        workspace=replace(workspace, progress=NullProgress()),
        devices=devices_of(workspace.device, config.processes, "pairs.processes"),
        threads=torch.get_num_threads(),
    )
    try:
        work = _fitted(work, config, workspace)
        _draw_all(work, config, workspace)
    finally:
        unload_drawer()
    names = [shard_name(number) for number in range(work.content.shards)]
    with workspace.folder("artifact") as folder:
        return publish_shards(work.content, names, INDEX_SCHEMA, folder, workspace)


def _check(config: PairsConfig, facts: TeacherFacts) -> None:
    check_sampler(config.sampler, facts.scheduler_config, facts.prediction_type, config.steps)


def _content(config: PairsConfig, inputs: Inputs, facts: TeacherFacts, workspace: Workspace) -> Pairs:
    """What will be made. A teacher that is told sizes is told those of its own pictures, as diffusers' pipelines do: uncropped, as large as asked."""
    shape = inputs.latents.content.latent_shape
    downscale = facts.resolution // facts.latent_shape[1]
    height, width = shape[1] * downscale, shape[2] * downscale
    return Pairs(
        pairs=config.count,
        shards=-(-config.count // config.shard_pairs),
        latent_shape=shape,
        teacher=inputs.teacher.identity,
        latents=inputs.latents.identity,
        time_ids=(height, width, 0, 0, height, width) if facts.architecture == "StableDiffusionXLPipeline" else None,
        sampler=config.sampler,
        steps=config.steps,
        guidance_scale=config.guidance_scale,
        precision=config.precision,
        seed=workspace.seed if config.seed is None else config.seed,
        batch_size=config.batch_size or (_ON_A_CPU if workspace.device == "cpu" else _TRIED),
        shard_pairs=config.shard_pairs,
    )


def _fitted(work: Work, config: PairsConfig, workspace: Workspace) -> Work:
    """The same work with the batch that fits memory, found once for all processes and runs; only where that was left open."""
    if config.batch_size is not None or workspace.device == "cpu":
        return work

    def trial() -> int:
        tried = min(work.content.batch_size, work.content.shard_pairs)
        return loaded_drawer(work).fitting(tried, captions_of(range(1), work).unconditional)

    found = fitted_once(workspace, "pairs", trial)
    unload_drawer()  # it was told another batch
    logger.info("pairs: %d at once fit the memory of %s", found, work.devices[0])
    return replace(work, content=work.content.model_copy(update={"batch_size": found}))


def _draw_all(work: Work, config: PairsConfig, workspace: Workspace) -> None:
    """Make the shards that are not kept yet, by as many processes as were asked for and have a device."""
    total = work.content.pairs
    left = shards_left([shard_name(number) for number in range(work.content.shards)], workspace)
    processes = processes_for_shards(left, config.processes, work.devices, workspace.device)
    pairs = total - sum(len(work.numbers(number)) for number in left)
    for made in map_processes(partial(draw_shard, work=work), left, processes):
        pairs += made
        workspace.progress.update(pairs, total, "pairs")
