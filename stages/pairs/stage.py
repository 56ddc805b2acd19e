"""The stage `pairs`: noise and what the deterministic teacher makes of it (DMD, arXiv 2311.18828, 3.3), in shards kept one by one."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from infra.progress import NullProgress
from schemas.base import Model
from schemas.errors import BadInput
from schemas.manifest import Latents, Manifest, Pairs, Teacher
from schemas.pairs import PairsConfig
from schemas.recipe import Recipe
from schemas.share import Share
from stages.diffusion.facts import inspect
from stages.fitting import fitted_once
from stages.kept_shards import processes_for_shards, publish_shards, shards_left
from stages.pairs.content import check_pairs, planned_content
from stages.pairs.shard import INDEX_SCHEMA, Work, captions_of, draw_shard, loaded_drawer, shard_name, unload_drawer
from stages.parallel import devices_of, map_processes
from stages.students import check_teacher
from stages.workspace import Workspace

logger = logging.getLogger(__name__)


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
        try:
            facts = inspect(folder)
        except BadInput:  # the stage teacher names what is wrong with it
            return
        check_pairs(config, facts)


def run(config: PairsConfig, inputs: Inputs, workspace: Workspace) -> Manifest[Pairs]:
    """Make the artifact `pairs`. Raises `BadInput` for latents of another teacher and for a sampler that cannot take it, before anything is drawn.

    On this machine's disk lie the teacher, one shard for each process, and the shards of the encoded set that hold its captions' text.
    """
    work = _drawn(config, inputs, workspace, Share(1, 1))
    names = [shard_name(number) for number in range(work.content.shards)]
    with workspace.folder("artifact") as folder:
        return publish_shards(work.content, names, INDEX_SCHEMA, folder, workspace)


def run_share(config: PairsConfig, inputs: Inputs, workspace: Workspace, share: Share) -> None:
    """Draw a share of the shards and keep them, for the run that makes the artifact of all. Raises what `run` raises."""
    _drawn(config, inputs, workspace, share)


def _drawn(config: PairsConfig, inputs: Inputs, workspace: Workspace, share: Share) -> Work:
    """Have every shard of the share kept, and return what was made."""
    check_teacher(inputs.teacher, inputs.latents)
    content = planned_content(
        config,
        inspect(workspace.fetch(inputs.teacher)),
        inputs.latents.content.latent_shape,
        seed=workspace.seed,
        device=workspace.device,
        teacher=inputs.teacher.identity,
        latents=inputs.latents.identity,
    )
    work = Work(
        content=content,
        teacher=inputs.teacher,
        latents=inputs.latents,
        workspace=replace(workspace, progress=NullProgress()),
        devices=devices_of(workspace.device, config.processes, "pairs.processes"),
        threads=torch.get_num_threads(),
    )
    try:
        work = _fitted(work, config, workspace)
        _draw_all(work, config, workspace, share)
    finally:
        unload_drawer()
    return work


def _fitted(work: Work, config: PairsConfig, workspace: Workspace) -> Work:
    """The same work with the batch that fits memory, found once for all processes and runs, on whatever devices these are; only where that was left
    open."""
    if config.batch_size is not None:
        return work

    def trial() -> int:
        if workspace.device == "cpu":
            return work.content.batch_size
        return loaded_drawer(work).fitting(work.content.batch_size, captions_of(range(1), work).unconditional)

    found = fitted_once(workspace, "pairs", trial)
    unload_drawer()  # it was told another batch
    logger.info("pairs: %d are drawn at once", found)
    return replace(work, content=work.content.model_copy(update={"batch_size": found}))


def _draw_all(work: Work, config: PairsConfig, workspace: Workspace, share: Share) -> None:
    """Make the shards of the share that are not kept yet, by as many processes as were asked for and have a device."""
    shards = [number for number in range(work.content.shards) if share.has(number)]
    left = [shards[place] for place in shards_left([shard_name(number) for number in shards], workspace)]
    processes = processes_for_shards(left, config.processes, work.devices, workspace.device)
    total = sum(len(work.numbers(number)) for number in shards)
    pairs = total - sum(len(work.numbers(number)) for number in left)
    for made in map_processes(partial(draw_shard, work=work), left, processes):
        pairs += made
        workspace.progress.update(pairs, total, "pairs")
