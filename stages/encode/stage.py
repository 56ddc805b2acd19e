"""The stage `encode`: latents and text embeddings of the selected pictures, shuffled once, in safetensors shards kept one by one."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from schemas.base import Model
from schemas.data import EncodeConfig
from schemas.errors import BadInput, RunFailed
from schemas.manifest import ImageShards, Latents, Manifest, Selection, Teacher
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.pipeline import TeacherPipeline
from stages.encode.crop import Crop, centre_crop, crop_pixels
from stages.pictures import BrokenPictureError, decode_rgb
from stages.selected import selected_places
from stages.shards import Place, Sample
from stages.teacher import check_resolution
from stages.workspace import Workspace

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_DECODERS: Final = 4
"""Threads that decode and shrink ahead of the VAE; Pillow releases Python's lock for both."""

_INDEX: Final = "index.parquet"

Item = TypeVar("Item")
Result = TypeVar("Result")

INDEX_SCHEMA: Final = pa.schema(
    [
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("key", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("original_width", pa.int64()),
        ("original_height", pa.int64()),
        ("crop_top", pa.int64()),
        ("crop_left", pa.int64()),
    ]
)


class Inputs(Model):
    """What `encode` reads."""

    images: Manifest[ImageShards]
    selection: Manifest[Selection]
    teacher: Manifest[Teacher]


def run(config: EncodeConfig, inputs: Inputs, workspace: Workspace) -> Manifest[Latents]:
    """Make the artifact `latents`. Every shard is a random sample of the whole set, because the order is shuffled by `workspace.seed`.

    Raises `BadInput` when the resolution does not suit the teacher's VAE, or a picture is smaller than it (`select.min_side_px` refuses such).
    """
    teacher = TeacherPipeline.load(workspace.fetch(inputs.teacher), workspace.device, vae_dtype=_DTYPES[config.vae_dtype])
    side = config.resolution_px or teacher.resolution
    check_resolution(side, teacher.downscale)
    _check_sizes(workspace.fetch(inputs.selection), side)
    places = selected_places(inputs.images, inputs.selection, workspace)
    places.sort(key=lambda place: _shuffled(workspace.seed, place.key))
    groups = _groups(places, config.shard_samples)
    done = {part.name for part in workspace.parts()}
    for number, group in enumerate(groups):
        name = shard_name(number)
        if name not in done:
            with workspace.folder("latents") as folder:
                _encode_shard(group, name, folder, teacher=teacher, side=side, config=config)
                workspace.save_part(name, folder, {"samples": len(group)})
        workspace.progress.update(min((number + 1) * config.shard_samples, len(places)), len(places), "samples")
    with workspace.folder("artifact") as folder:
        samples = _assemble(workspace, folder, len(groups))
        unconditional = teacher.unconditional()
        save_file(_text_tensors(unconditional, config), folder / "unconditional.safetensors")
        latent_side = side // teacher.downscale
        content = Latents(
            samples=samples,
            shards=len(groups),
            latent_shape=(teacher.latent_shape[0], latent_side, latent_side),
            text_tokens=unconditional.prompt_embeds.shape[1],
            text_features=unconditional.prompt_embeds.shape[2],
            teacher=inputs.teacher.identity,
        )
        return workspace.publish(folder, content)


def shard_name(number: int) -> str:
    """Name of a shard and of the part that keeps it, without suffix."""
    return f"latents-{number:05d}"


def _shuffled(seed: int, key: str) -> bytes:
    # The order of digests: a shuffle that no library's version can change.
    return hashlib.sha256(f"{seed}:{key}".encode()).digest()


def _check_sizes(selection: Path, side: int) -> None:
    """Raise `BadInput` before anything is encoded when a selected picture would have to be enlarged."""
    verdicts = pq.read_table(selection / "verdicts.parquet", columns=["key", "passed", "width", "height"])
    short = pc.min_element_wise(verdicts["width"], verdicts["height"])
    small = verdicts.filter(pc.and_(verdicts["passed"], pc.less(short, side)))
    if small.num_rows:
        first = small.slice(0, 1).to_pylist()[0]
        raise BadInput(
            f"encode.resolution_px = {side}: {small.num_rows} selected images are smaller, the first {first['key']} with "
            f"{first['width']} x {first['height']} pixels; expected select.min_side_px of at least {side - 1}, or a smaller resolution"
        )


def _encode_shard(group: Sequence[Place], name: str, folder: Path, *, teacher: TeacherPipeline, side: int, config: EncodeConfig) -> None:
    latents: list[Tensor] = []
    rows: list[dict[str, Any]] = []
    time_ids: list[Tensor] = []
    with ThreadPoolExecutor(_DECODERS) as decoders:
        prepared = _ahead(decoders, lambda place: _prepare(place, side), group, config.batch_size + _DECODERS)
        for batch in _batches(prepared, config.batch_size):
            latents.append(teacher.encode_images(torch.stack([pixels for _, _, pixels in batch])).cpu())
            for sample, crop, _ in batch:
                rows.append(_index_row(name, len(rows), sample, crop))
                ids = teacher.time_ids(crop.original_hw, (crop.top, crop.left), (side, side))
                time_ids += [] if ids is None else [ids.cpu()]
    text = _encode_captions([row["caption"] for row in rows], teacher, config)
    tensors = {"latents": torch.cat(latents).contiguous()} | _text_tensors(text, config)
    if time_ids:
        tensors["time_ids"] = torch.cat(time_ids)
    save_file(tensors, folder / f"{name}.safetensors")
    pq.write_table(pa.Table.from_pylist(rows, INDEX_SCHEMA), folder / _INDEX)


def _prepare(place: Place, side: int) -> tuple[Sample, Crop, Tensor]:
    sample = place.read()
    try:
        picture, _ = decode_rgb(sample.image)
    except BrokenPictureError as error:
        raise RunFailed(f"encode: selected image {sample.key} cannot be decoded here: {error.reason}") from error
    crop = centre_crop(picture.width, picture.height, side)
    return sample, crop, crop_pixels(picture, crop)


def _index_row(shard: str, row: int, sample: Sample, crop: Crop) -> dict[str, Any]:
    return {
        "shard": f"{shard}.safetensors",
        "row": row,
        "key": sample.key,
        "url": sample.row["url"],
        "caption": sample.caption,
        "original_width": crop.original_width,
        "original_height": crop.original_height,
        "crop_top": crop.top,
        "crop_left": crop.left,
    }


def _encode_captions(captions: Sequence[str], teacher: TeacherPipeline, config: EncodeConfig) -> Conditioning:
    """Conditioning of the captions, on the CPU; one that a shard repeats is encoded once."""
    distinct = list(dict.fromkeys(captions))
    encoded = Conditioning.cat([teacher.encode_prompts(batch).to("cpu") for batch in _groups(distinct, config.batch_size)])
    place = {caption: i for i, caption in enumerate(distinct)}
    return encoded[[place[caption] for caption in captions]]


def _text_tensors(text: Conditioning, config: EncodeConfig) -> dict[str, Tensor]:
    stored = text.to("cpu", _DTYPES[config.text_dtype])
    tensors = {"prompt_embeds": stored.prompt_embeds.contiguous()}
    return tensors if stored.pooled is None else tensors | {"pooled": stored.pooled.contiguous()}


def _assemble(workspace: Workspace, folder: Path, shards: int) -> int:
    """Bring the shards kept as parts into `folder`, join their indices, and return the number of samples."""
    parts = {part.name: part for part in workspace.parts()}
    samples = 0
    with pq.ParquetWriter(folder / _INDEX, INDEX_SCHEMA) as index:
        for number in range(shards):
            name = shard_name(number)
            with workspace.folder("part") as place:
                loaded = workspace.load_part(parts[name], place)
                (loaded / f"{name}.safetensors").replace(folder / f"{name}.safetensors")
                rows = pq.read_table(loaded / _INDEX)
            index.write_table(rows)
            samples += rows.num_rows
    return samples


def _groups(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _ahead(pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], window: int) -> Iterator[Result]:
    """Map in order over threads, never more than `window` results ahead of their use."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= window:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
