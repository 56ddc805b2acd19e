"""Samples of every row: the same prompts and the same starting noise for all, kept shard by shard so that a killed run goes on where it was."""

import io
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from schemas.errors import CorruptArtifact, RunFailed
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.sampling import draw_noise, image_generator, sample
from stages.evaluate.encoded_pictures import EncodedPictures
from stages.evaluate.pieces import Pieces
from stages.evaluate.prompts import PromptSet
from stages.evaluate.rows import Row
from stages.evaluate.schedulers import checked_scheduler
from stages.pictures import decode_rgb
from stages.shards import Sample, ShardWriter, read_samples, shard_paths

Pixels = NDArray[np.uint8]

SHARD_IMAGES: Final = 128
"""Images of one shard, which is what a killed run loses at most. Rounded up to whole batches."""

_ENCODED_BYTES: Final = 2 * 2**30
"""Text embeddings kept for the next row; beyond it prompts are encoded again."""


class Sampler:
    """What all rows share: the pipeline, the prompts and the noise."""

    def __init__(
        self,
        pipeline: TeacherPipeline,
        prompts: PromptSet,
        *,
        seed: int,
        batch_size: int,
        tick: Callable[[int], None],
        size: tuple[int, int] | None = None,
        encoded: EncodedPictures | None = None,
    ) -> None:
        """`tick` hears the number of images as they are done; `size` is their height and width in pixels where it is not the pipeline's own;
        `encoded` are pictures that sampling starts from, or whose edges it follows."""
        self.pipeline, self.prompts, self.seed, self.batch_size, self.tick = pipeline, prompts, seed, batch_size, tick
        self.size, self.encoded = size, encoded
        self._unconditional: Conditioning | None = None
        self._encoded: dict[int, Conditioning] = {}

    def on(self, pipeline: TeacherPipeline, size: tuple[int, int] | None, encoded: EncodedPictures | None = None) -> "Sampler":
        """The same prompts and noise for another pipeline, from pictures; of another size, noise of that shape from the same seeds."""
        shared: dict[str, Any] = {"seed": self.seed, "batch_size": self.batch_size, "tick": self.tick}
        return Sampler(pipeline, self.prompts, **shared, size=size, encoded=encoded)

    def of_batch(self, batch_size: int) -> "Sampler":
        """The same in batches of another size, unheard by `tick`."""
        return Sampler(self.pipeline, self.prompts, seed=self.seed, batch_size=batch_size, tick=lambda _images: None, size=self.size)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        channels, height, width = self.pipeline.latent_shape
        if self.size is not None:
            height, width = (side // self.pipeline.downscale for side in self.size)
        return channels, height, width

    def batch(self, row: Row, denoiser: Denoiser, first: int) -> Pixels:
        """RGB pictures (B, H, W, 3) of the images `first` to `first + batch_size`, those a plain diffusers call gives, bit for bit.

        An image's noise, the starting noise and what an LCM step adds, is a function of (seed, its index) only.
        """
        conditioning = self._conditioning(first)
        if row.guidance_input:
            conditioning = conditioning.with_guidance(row.guidance_scale - 1)
        guidance_scale = 1.0 if row.guidance_input else row.guidance_scale
        images = range(first, first + conditioning.batch)
        generators = [image_generator(self.seed, index) for index in images]
        start = None
        if self.encoded is not None:
            denoiser, start = self.encoded.controlled(denoiser, images), self.encoded.start(images)
        latents = sample(
            denoiser,
            draw_noise(generators, self.latent_shape, self.pipeline.device),
            conditioning,
            scheduler=scheduler_of(row, self.pipeline.scheduler_config),
            steps=row.steps,
            guidance_scale=guidance_scale,
            unconditional=self._no_text() if guidance_scale > 1 else None,
            generator=generators,
            start=start,
        )
        if not torch.isfinite(latents).all():
            raise RunFailed(f"{row.name}: NaN or Inf in the latents of images {first} to {first + conditioning.batch - 1}")
        decoded = self.pipeline.decode(latents).permute(0, 2, 3, 1).cpu().numpy()
        pixels: Pixels = (decoded * 255).round().astype(np.uint8)
        return pixels

    def _conditioning(self, first: int) -> Conditioning:
        if first in self._encoded:
            return self._encoded[first]
        conditioning = self.pipeline.encode_prompts(self.prompts.images[first : first + self.batch_size])
        conditioning = conditioning.with_time_ids(self._time_ids())
        if conditioning.prompt_embeds[0].nbytes * len(self.prompts.images) <= _ENCODED_BYTES:
            self._encoded[first] = conditioning
        return conditioning

    def _no_text(self) -> Conditioning:
        if self._unconditional is None:
            self._unconditional = self.pipeline.unconditional().with_time_ids(self._time_ids())
        return self._unconditional

    def _time_ids(self) -> Tensor | None:
        """(1, 6): original and target size are the pictures' own, as in diffusers' pipelines."""
        return self.pipeline.time_ids(original_hw=self.size, target_hw=self.size)


def scheduler_of(row: Row, scheduler_config: Mapping[str, Any]) -> Any:
    """The row's diffusers scheduler. Raises `BadInput` where its timesteps are not those that the student's manifest names."""
    return checked_scheduler(row.name, row.sampler, scheduler_config, row.prediction_type, [row.timesteps])


def sample_row(row: Row, load: Callable[[], Denoiser], sampler: Sampler, pieces: Pieces, folder: Path) -> None:
    """Make the row's shards in `folder`, taking over what an earlier run has kept.

    `load` is called at most once, and not at all when every shard is there.
    """
    total = len(sampler.prompts.images)
    per_shard = -(-SHARD_IMAGES // sampler.batch_size) * sampler.batch_size
    folder.mkdir(parents=True, exist_ok=True)
    denoiser: Denoiser | None = None
    for number, first in enumerate(range(0, total, per_shard)):
        images = range(first, min(first + per_shard, total))
        with pieces.piece(f"samples-{row.slug}-{number:05d}") as (shard, made):
            if made:
                sampler.tick(len(images))
            else:
                denoiser = denoiser or load()
                _write_shard(row, denoiser, sampler, shard, images)
            shutil.copyfile(shard / "shard-00000.tar", folder / f"shard-{number:05d}.tar")


def _write_shard(row: Row, denoiser: Denoiser, sampler: Sampler, folder: Path, images: range) -> None:
    writer = ShardWriter(folder, len(images))
    for first in range(images.start, images.stop, sampler.batch_size):
        pictures = sampler.batch(row, denoiser, first)
        for offset, picture in enumerate(pictures):
            index = first + offset
            about = {"index": index, "seed": sampler.seed, "steps": row.steps}
            writer.add(Sample(f"{index:06d}", "png", _png(picture), sampler.prompts.images[index], about))
        sampler.tick(len(pictures))
    writer.close()


def read_pictures(folder: Path) -> Iterator[Pixels]:
    """Pictures of a row, in order, from its shards."""
    for path in shard_paths(folder):
        for stored in read_samples(path):
            yield np.asarray(decode_rgb(stored.image)[0])


def first_pictures(folder: Path, indices: list[int]) -> list[Pixels]:
    """The pictures with these indices, in their order. Raises `CorruptArtifact` when one is not there."""
    wanted, found = set(indices), {}
    for number, picture in enumerate(read_pictures(folder)):
        if number in wanted:
            found[number] = picture
        if len(found) == len(wanted):
            return [found[index] for index in indices]
    raise CorruptArtifact(f"{folder.name}: holds {len(found)} of the pictures {indices}")


def square(picture: Image.Image, side: int) -> Image.Image:
    """Centre crop to a square, then Lanczos to `side` pixels (the reference protocol of DMD2, arXiv 2405.14867)."""
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    cropped = picture.crop((left, top, left + short, top + short))
    return cropped if short == side else cropped.resize((side, side), Image.Resampling.LANCZOS)


def real_pictures(samples: Iterable[Sample], side: int) -> Iterator[Pixels]:
    """Pictures as squares of `side` pixels, in order."""
    for stored in samples:
        yield np.asarray(square(decode_rgb(stored.image)[0], side))


def _png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
