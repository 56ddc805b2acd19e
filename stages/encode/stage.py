"""The stage `encode`: latents and text embeddings of the selected pictures, shuffled once, in safetensors shards kept one by one."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file

from infra.progress import NullProgress
from schemas.base import Model
from schemas.data import EncodeConfig
from schemas.errors import BadInput
from schemas.manifest import ImageShards, Latents, Manifest, Selection, Teacher
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.facts import inspect
from stages.diffusion.pipeline import TeacherPipeline
from stages.encode.order import check_sizes, without_elongated, write_order
from stages.encode.shard import (
    INDEX_SCHEMA,
    Work,
    encode_shard,
    loaded_encoder,
    shard_name,
    text_tensors,
    unload_encoder,
)
from stages.encoded_size import EncodedSize, encoded_size, human
from stages.fitting import fitted_once
from stages.kept_shards import processes_for_shards, publish_shards, shards_left
from stages.parallel import devices_of, map_processes
from stages.selected import SelectedPictures
from stages.teacher import check_resolution
from stages.workspace import Workspace

logger = logging.getLogger(__name__)

_PIXELS_AT_ONCE: Final = 2**20
"""Of `batch_size: auto` on a CPU, which gains nothing by more."""
_PIXELS_TRIED: Final = 8 * 2**20
"""Of `batch_size: auto` on a device whose memory is tried first."""
_LARGEST_SHARD: Final = 5 * 10**9
"""Bytes: what S3 copies in one call, and a process's memory has to hold."""


class Inputs(Model):
    """What `encode` reads."""

    images: Manifest[ImageShards]
    selection: Manifest[Selection]
    teacher: Manifest[Teacher]


def run(config: EncodeConfig, inputs: Inputs, workspace: Workspace) -> Manifest[Latents]:
    """Make the artifact `latents`. Every shard is a random sample of the whole set, because the order is shuffled by `workspace.seed`.

    On this machine's disk lie the teacher, the tables of verdicts and offsets, and one shard for each process: pictures are read from the store
    one by one, and finished shards are copied inside it. Raises `BadInput` when the resolution does not suit the teacher's VAE, or a picture is
    smaller than it (`select.min_side_px` refuses such), and `RunFailed` when every picture is too elongated.
    """
    teacher = workspace.fetch(inputs.teacher)
    facts = inspect(teacher)
    side = config.resolution_px or facts.resolution
    downscale = facts.resolution // facts.latent_shape[1]
    check_resolution(side, downscale)
    pictures = SelectedPictures.open(inputs.images, inputs.selection, workspace).table
    check_sizes(pictures, side)
    pictures, dropped = without_elongated(pictures, config.aspect)
    with workspace.folder("order") as folder:
        shard_samples = _shard_samples(encoded_size(teacher, config), config)
        order = write_order(pictures, folder / "order.parquet", seed=workspace.seed, shard_samples=shard_samples)
        del pictures
        _encode_all(
            Work(
                config=config,
                images=inputs.images,
                teacher=teacher,
                order=order,
                workspace=replace(workspace, progress=NullProgress()),
                side=side,
                devices=devices_of(workspace.device, config.processes, "encode.processes"),
                threads=torch.get_num_threads(),
                pictures_at_once=first_batch(config, workspace.device, side),
            ),
            workspace,
        )
    unconditional = _unconditional(teacher, workspace.device)
    content = Latents(
        samples=order.samples,
        shards=order.shards,
        latent_shape=(facts.latent_shape[0], side // downscale, side // downscale),
        dropped=dropped,
        text=config.text,
        captions=order.captions,
        text_tokens=unconditional.prompt_embeds.shape[1],
        text_features=unconditional.prompt_embeds.shape[2],
        teacher=inputs.teacher.identity,
    )
    return _publish(content, unconditional, config, workspace)


def _shard_samples(size: EncodedSize, config: EncodeConfig) -> int:
    samples = size.shard_samples(config)
    if samples * size.sample(config) > _LARGEST_SHARD:
        raise BadInput(
            f"encode.shard_samples = {samples}: a shard of {human(samples * size.sample(config))}; expected at most "
            f"{_LARGEST_SHARD // size.sample(config)} samples ({human(_LARGEST_SHARD)}), or shard_mb in its place"
        )
    return samples


def _encode_all(work: Work, workspace: Workspace) -> None:
    """Make the shards that are not kept yet, by as many processes as were asked for and have a device."""
    order = work.order
    left = shards_left([shard_name(number) for number in range(order.shards)], workspace)
    if not left:
        return
    processes = processes_for_shards(left, work.config.processes, work.devices, workspace.device)
    try:
        work = _fitted(work, workspace)
        if processes > 1:
            unload_encoder()  # the processes load their own
        samples = order.samples - sum(order.shard_rows(number) for number in left)
        for made in map_processes(partial(encode_shard, work=work), left, processes):
            samples += made
            workspace.progress.update(samples, order.samples, "samples")
    finally:
        unload_encoder()


def first_batch(config: EncodeConfig, device: str, side: int) -> int:
    """Pictures to put through the VAE together, before memory has had its say."""
    if config.batch_size != "auto":
        return config.batch_size
    return max(1, (_PIXELS_AT_ONCE if device == "cpu" else _PIXELS_TRIED) // side**2)


def _fitted(work: Work, workspace: Workspace) -> Work:
    """The same work with the batch that fits memory, found once for all processes and runs; only where that was left open."""
    if work.config.batch_size != "auto" or workspace.device == "cpu":
        return work
    found = fitted_once(workspace, "pictures", lambda: loaded_encoder(work).fitting())
    logger.info("encode: %d pictures of %d px at once fit the memory of %s", found, work.side, work.devices[0])
    return replace(work, pictures_at_once=found)


def _unconditional(teacher: Path, device: str) -> Conditioning:
    return TeacherPipeline.load(teacher, device, only=frozenset({"text"})).unconditional()


def _publish(content: Latents, unconditional: Conditioning, config: EncodeConfig, workspace: Workspace) -> Manifest[Latents]:
    """Make the artifact of the kept shards."""
    with workspace.folder("artifact") as folder:
        save_file(text_tensors(unconditional, config), folder / "unconditional.safetensors")
        return publish_shards(content, [shard_name(number) for number in range(content.shards)], INDEX_SCHEMA, folder, workspace)
