"""One shard: pictures read from where they lie, cropped, through the VAE in batches that fit memory, with the captions that are new in it."""

import gc
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from schemas.data import EncodeConfig
from schemas.errors import RunFailed
from schemas.manifest import ImageShards, Manifest
from stages.batching import in_batches
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.facts import read_config
from stages.diffusion.pipeline import Part, TeacherPipeline
from stages.encode.crop import Crop, centre_crop, crop_pixels, random_crop
from stages.encode.order import Order
from stages.kept_shards import INDEX
from stages.parallel import OnePerProcess, worker_rank
from stages.pictures import BrokenPictureError, decode_rgb
from stages.selected import read_picture
from stages.shards import Sample, shard_names
from stages.workspace import Workspace

logger = logging.getLogger(__name__)

_READERS: Final = 8
"""Threads that read, decode and shrink ahead of the VAE; Pillow releases Python's lock for both."""
_CAPTIONS: Final = 32
"""Captions encoded together: always as many, so that their last bits depend on nothing but their place."""
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}

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
        ("text_shard", pa.string()),  # where the caption's embedding lies: with the first sample that has it; null where none is stored
        ("text_row", pa.int64()),
    ]
)


@dataclass(frozen=True, eq=False)
class Work:
    """What every process of a run needs to make any shard of it. Travels to them by pickle."""

    config: EncodeConfig
    images: Manifest[ImageShards]
    teacher: Path
    order: Order
    workspace: Workspace
    side: int
    """Of the training crop, in pixels."""
    devices: tuple[str, ...]
    """Process number n works on device n modulo their number."""
    threads: int
    """Of torch on the CPU, the same in all processes: last bits depend on it."""
    pictures_at_once: int


def shard_name(number: int) -> str:
    """Name of a shard and of the part that keeps it, without suffix."""
    return f"latents-{number:05d}"


def encode_shard(number: int, work: Work) -> int:
    """Make one shard, keep it as a part, and return its number of samples. Raises `RunFailed`, `CorruptArtifact`."""
    encoder = loaded_encoder(work)
    rows = work.order.shard(number)
    name = shard_name(number)
    with work.workspace.folder("latents") as folder:
        encoder.encode(rows, name, folder)
        work.workspace.save_part(name, folder, {"samples": rows.num_rows})
    return int(rows.num_rows)


class ShardEncoder:
    """The teacher's VAE and text encoders on one device."""

    def __init__(self, work: Work, device: str) -> None:
        self.work = work
        self.pictures_at_once = work.pictures_at_once
        self.shards = shard_names(work.images)
        only: frozenset[Part] = frozenset({"vae", "text"} if work.config.text == "precomputed" else {"vae"})
        self.teacher = TeacherPipeline.load(work.teacher, device, vae_dtype=vae_dtype(work.config, work.teacher), only=only)
        if work.config.vae_slicing:
            self.teacher.vae.enable_slicing()
        if work.config.vae_tiling:
            self.teacher.vae.enable_tiling()

    def encode(self, rows: pa.Table, name: str, folder: Path) -> None:
        """Write `NAME.safetensors` and its part of the index."""
        latents: list[Tensor] = []
        index: list[dict[str, Any]] = []
        time_ids: list[Tensor] = []
        side = self.work.side
        with ThreadPoolExecutor(_READERS) as readers:
            prepared = _ahead(readers, self._prepare, rows.to_pylist(), self.work.pictures_at_once + _READERS)
            for batch in in_batches(prepared, self.work.pictures_at_once):
                latents += self.latents(torch.stack([pixels for *_, pixels in batch]), [sample.key for _, sample, *_ in batch])
                for row, sample, crop, _ in batch:
                    index.append(_index_row((name, len(index)), row, sample, crop, self.work.config))
                    ids = self.teacher.time_ids(crop.original_hw, (crop.top, crop.left), (side, side))
                    time_ids += [] if ids is None else [ids.cpu()]
        tensors = {"latents": torch.cat(latents).contiguous()}
        new = rows.filter(rows["text_new"])["caption"].to_pylist()
        if self.work.config.text == "precomputed" and new:
            tensors |= text_tensors(self.captions(new), self.work.config)
        if time_ids:
            tensors["time_ids"] = torch.cat(time_ids)
        save_file(tensors, folder / f"{name}.safetensors")
        pq.write_table(pa.Table.from_pylist(index, INDEX_SCHEMA), folder / INDEX)

    def latents(self, pixels: Tensor, keys: Sequence[str]) -> list[Tensor]:
        """Latents of a batch (B, 3, H, W), in pieces. Where memory runs out the batch is halved, for all that follow as well.

        Raises `RunFailed` when one picture does not fit, and naming the picture whose latents are not finite.
        """
        done: list[Tensor] = []
        first = 0
        while first < len(pixels):
            part = pixels[first : first + self.pictures_at_once]
            found = self._attempt(part)
            if found is None:
                self._halve(len(part))
                continue
            for key, one in zip(keys[first:], found, strict=False):
                if not torch.isfinite(one).all():
                    raise RunFailed(f"encode: the latents of {key} are not finite: the VAE overflows; expected encode.vae_dtype float32")
            done.append(found)
            first += len(part)
        return done

    def _attempt(self, pixels: Tensor) -> Tensor | None:
        """The latents on the CPU, or None where memory ran out. Whatever the attempt held is let go before another is made."""
        try:
            return self.teacher.encode_images(pixels, at_once=len(pixels)).cpu()
        except torch.OutOfMemoryError:
            logger.warning("out of memory with %d pictures of %d px at once", len(pixels), pixels.shape[-1])
        gc.collect()
        torch.cuda.empty_cache()  # nothing, where there is no CUDA
        return None

    def _halve(self, failed: int) -> None:
        if failed == 1:
            raise RunFailed(
                f"encode: one picture of {self.work.side} x {self.work.side} pixels does not fit the memory of {self.teacher.device}: "
                "expected encode.vae_tiling, encode.vae_dtype bfloat16, or a smaller resolution"
            )
        self.pictures_at_once = failed // 2
        logger.warning("going on with %d; the last bits of latents can differ from those of a larger batch", self.pictures_at_once)

    def fitting(self) -> int:
        """Pictures that fit memory together, by trial on empty ones, halved from what was asked for."""
        while self._attempt(torch.zeros(self.pictures_at_once, 3, self.work.side, self.work.side)) is None:
            self._halve(self.pictures_at_once)
        return self.pictures_at_once

    def captions(self, captions: Sequence[str]) -> Conditioning:
        """Conditioning of the captions, on the CPU, in the type in which it is stored."""
        return encode_captions(self.teacher, captions).to(dtype=_DTYPES[self.work.config.text_dtype])

    def _prepare(self, row: dict[str, Any]) -> tuple[dict[str, Any], Sample, Crop, Tensor]:
        work = self.work
        sample = read_picture(work.workspace, work.images, self.shards[row["shard"]], row)
        try:
            picture, _ = decode_rgb(sample.image)
        except BrokenPictureError as error:
            raise RunFailed(f"encode: selected image {sample.key} cannot be decoded here: {error.reason}") from error
        crop = CROPS[work.config.aspect.crop](picture.width, picture.height, work.side, work.workspace.seed, sample.key)
        return row, sample, crop, crop_pixels(picture, crop)


CROPS: Final[dict[str, Callable[[int, int, int, int, str], Crop]]] = {
    "centre": lambda width, height, side, _seed, _key: centre_crop(width, height, side),
    "random": random_crop,
}


def encode_captions(teacher: TeacherPipeline, captions: Sequence[str]) -> Conditioning:
    """Conditioning of captions (at least one), on the CPU."""
    return Conditioning.cat([teacher.encode_prompts(batch).to("cpu") for batch in in_batches(captions, _CAPTIONS)])


def text_tensors(text: Conditioning, config: EncodeConfig) -> dict[str, Tensor]:
    """Tensors of a text as they are stored."""
    stored = text.to("cpu", _DTYPES[config.text_dtype])
    tensors = {"prompt_embeds": stored.prompt_embeds.contiguous()}
    return tensors if stored.pooled is None else tensors | {"pooled": stored.pooled.contiguous()}


def vae_dtype(config: EncodeConfig, teacher: Path) -> torch.dtype:
    """Type that the VAE computes in. A VAE that says nothing of `force_upcast` is taken as diffusers takes it: upcast."""
    if config.vae_dtype != "teacher":
        return _DTYPES[config.vae_dtype]
    return torch.float32 if read_config(teacher, "vae").get("force_upcast", True) else torch.bfloat16


_encoder: OnePerProcess[ShardEncoder] = OnePerProcess()
"""By the identity of what it works on."""


def loaded_encoder(work: Work) -> ShardEncoder:
    """This process's encoder, loaded at its first shard."""

    def load() -> ShardEncoder:
        torch.set_num_threads(work.threads)
        return ShardEncoder(work, work.devices[worker_rank() % len(work.devices)])

    return _encoder.get(work.workspace.identity, load)


def unload_encoder() -> None:
    """Let the encoder's memory go."""
    _encoder.clear()


def _index_row(at: tuple[str, int], place: dict[str, Any], sample: Sample, crop: Crop, config: EncodeConfig) -> dict[str, Any]:
    shard, row = at
    stored = config.text == "precomputed"
    return {
        "shard": f"{shard}.safetensors",
        "row": row,
        "key": sample.key,
        "url": sample.row.get("url"),
        "caption": sample.caption,
        "original_width": crop.original_width,
        "original_height": crop.original_height,
        "crop_top": crop.top,
        "crop_left": crop.left,
        "text_shard": f"{shard_name(place['text_shard'])}.safetensors" if stored else None,
        "text_row": place["text_row"] if stored else None,
    }


def _ahead(pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], window: int) -> Iterator[Result]:
    """Map in order over threads, never more than `window` results ahead of their use."""
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
