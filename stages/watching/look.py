"""A look at the student in training: fixed-seed samples by its own sampler, their FID to the teacher, and the best weights so far."""

import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, Final, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from schemas.lightning import trailing_timesteps
from schemas.manifest import Manifest, StudentLoRA, StudentUNet, Teacher
from schemas.training import StudentTraining
from schemas.watching import Watch
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.denoiser import Denoiser, UNetDenoiser
from stages.diffusion.pipeline import TeacherPipeline
from stages.encoded import Encoded
from stages.evaluate.feature_network import features_of
from stages.evaluate.features import check_extractor, open_extractor
from stages.evaluate.fid import FeatureStatistics, bias_warning, frechet_distance
from stages.evaluate.grid import thumbnail
from stages.evaluate.pieces import Pieces
from stages.evaluate.prompts import PromptSet
from stages.evaluate.rows import TEACHER
from stages.evaluate.rows import Row as SampledRow
from stages.evaluate.samples import Pixels, Sampler, scheduler_of
from stages.students import Student
from stages.training import Row
from stages.training.data import indices
from stages.training.loop import autocast
from stages.training.randomness import derive_seed, deterministic_kernels
from stages.training.sharding import whole
from stages.workspace import Workspace

FID: Final = "student.fid_teacher"
"""Column of the metrics: the mean over the step counts looked at."""

_BEST, _REFERENCE, _STRIP, _FEATURES = "watch-best", "watch-reference", "strip.png", "features.safetensors"
_GAP: Final = 4
_DECIMALS: Final = 6


def check_watch(section: str, config: StudentTraining, outside: Mapping[str, str]) -> None:
    """Look for what the looks will need. Raises `BadInput` naming the section's field."""
    if config.watch is not None:
        check_extractor(config.watch.extractor, outside, f"{section}.watch")


@dataclass(frozen=True, eq=False)
class Seen:
    """What the looks have left."""

    keep: Literal["last", "best"]
    """Which weights are to be the student's."""
    best_step: int
    best_fid: float
    best: Mapping[str, Tensor]
    """The student's tensors at that step."""
    captions: tuple[str, ...]
    """Of a strip's pictures, from the left."""
    strips: Mapping[int, bytes]
    """PNG by step: the same captions and noise in all, a line of pictures for each step count looked at, in their order."""
    teacher: bytes
    """The teacher's strip, one line."""
    steps: tuple[int, ...]
    """Step counts looked at."""
    bias: str = ""
    """What a reader must know of FIDs of so few images."""


class StudentWatch:
    """The loop's observer."""

    def __init__(
        self, config: Watch, student: Student, looked_at: Sequence[SampledRow], sampler: "EncodedSampler", workspace: Workspace
    ) -> None:
        """`looked_at` has the student with each of the step counts that count."""
        self.config, self.student, self.looked_at, self.sampler, self.workspace = config, student, tuple(looked_at), sampler, workspace
        self.every = config.every
        section = f"{workspace.lineage.stage}.watch"
        self._extractor = functools.cache(
            lambda: open_extractor(config.extractor, workspace.outside, workspace.scratch, workspace.device, section)
        )
        self._reference: FeatureStatistics | None = None

    @classmethod
    def open(
        cls,
        config: StudentTraining,
        student: Student,
        content: StudentUNet | StudentLoRA,
        *,
        teacher: Manifest[Teacher],
        latents: Encoded,
        workspace: Workspace,
    ) -> Self | None:
        """Draw the teacher's samples, or find them drawn, for a student that will be published as `content`. None: the recipe asks for no looks."""
        if config.watch is None:
            return None
        counts = content.steps if config.watch.steps is None else config.watch.steps
        rows = [SampledRow.of_student("student", "student", count, content) for count in counts]
        pipeline = TeacherPipeline.load(workspace.fetch(teacher), workspace.device, only=frozenset({"vae"}))
        seed = derive_seed(workspace.seed if config.seed is None else config.seed, "watch")
        watch = cls(config.watch, student, rows, EncodedSampler(pipeline, latents, config.watch, seed), workspace)
        for row in rows:
            scheduler_of(row, pipeline.scheduler_config)
        if workspace.parallel.leads:
            with deterministic_kernels(), autocast(config, torch.device(workspace.device)):  # as the loop draws the student's
                watch._draw_reference(teacher)
        return watch

    def observe(self, step: int, rows: Sequence[Row]) -> dict[str, float]:
        """Draw, measure and keep: the pictures of this step, and the weights where no earlier look of `rows` was as good.

        Where the weights are divided over processes all of them draw, and the first measures and keeps.
        """
        denoiser = self.student.denoiser
        assert isinstance(denoiser, UNetDenoiser)
        fids: dict[int, float] = {}
        shown: list[Sequence[Pixels]] = []
        denoiser.unet.eval()
        try:
            for row in self.looked_at:
                pictures = list(self.sampler.pictures(row, denoiser, self.config.images))
                if self.workspace.parallel.leads:
                    fids[row.steps] = self._fid(pictures)
                    shown.append(pictures[: self.config.grid_images])
        finally:
            denoiser.unet.train()
        weights = {name: whole(tensor.detach()).contiguous() for name, tensor in self.student.tensors.items()}
        if not self.workspace.parallel.leads:
            return {}
        fid = round(fmean(fids.values()), _DECIMALS)
        with self.workspace.folder("look") as folder:
            (folder / _STRIP).write_bytes(strip(*shown))
            self.workspace.save_part(_look(step), folder, {"step": step})
        if fid < min((row[FID] for row in rows if FID in row), default=float("inf")):
            with self.workspace.folder("best") as folder:
                save_file(weights, folder / "best.safetensors")
                self.workspace.save_part(_BEST, folder, {"step": step})
        return {FID: fid} | ({fid_column(steps): value for steps, value in fids.items()} if len(fids) > 1 else {})

    def _fid(self, pictures: Sequence[Pixels]) -> float:
        assert self._reference is not None, "the first process drew it"
        return round(frechet_distance(FeatureStatistics.of(self._features(pictures)), self._reference), _DECIMALS)

    def seen(self, rows: Sequence[Row]) -> Seen:
        """Bring back what the looks have kept. The best of all `rows` counts, those of a stretch that was taken back too."""
        looks = [(row[FID], int(row["step"])) for row in rows if FID in row]
        fid = min(fid for fid, _ in looks)
        parts = {part.name: part for part in self.workspace.parts()}

        def fetched(name: str) -> Path:
            return self.workspace.load_part(parts[name], self.workspace.scratch / name)

        return Seen(
            keep=self.config.keep,
            best_step=next(step for found, step in looks if found == fid),
            best_fid=fid,
            best=load_file(fetched(_BEST) / "best.safetensors"),
            captions=self.sampler.prompts.images[: self.config.grid_images],
            strips={step: (fetched(_look(step)) / _STRIP).read_bytes() for step in sorted({step for _, step in looks})},
            teacher=(fetched(_REFERENCE) / _STRIP).read_bytes(),
            steps=tuple(row.steps for row in self.looked_at),
            bias=_bias(load_arrays(fetched(_REFERENCE) / _FEATURES)["features"]),
        )

    def _draw_reference(self, teacher: Manifest[Teacher]) -> None:
        """Statistics of the base teacher's own samples, on other noise than the student's, and its pictures on the same."""
        config = self.config
        with Pieces(self.workspace).piece(_REFERENCE) as (folder, made):
            if not made:
                pipeline = TeacherPipeline.load(self.workspace.fetch(teacher), self.workspace.device, only=frozenset({"unet"}))
                steps = config.teacher_steps
                row = SampledRow(
                    TEACHER, TEACHER, steps, trailing_timesteps(steps), "trailing", pipeline.facts.prediction_type, config.teacher_guidance_scale
                )  # fmt: skip
                drawn = self.sampler.on_other_noise().pictures(row, pipeline.denoiser(), config.images)
                save_arrays({"features": self._features(drawn)}, folder / _FEATURES)
                shown = self.sampler.pictures(row, pipeline.denoiser(), config.grid_images)
                (folder / _STRIP).write_bytes(strip(list(shown)))
            self._reference = FeatureStatistics.of(load_arrays(folder / _FEATURES)["features"])

    def _features(self, pictures: Any) -> NDArray[np.float32]:
        return features_of(pictures, self._extractor(), self.workspace.device)


class EncodedSampler(Sampler):
    """Samples on captions of the encoded set, with the embeddings it holds: no text encoder is needed."""

    def __init__(self, pipeline: TeacherPipeline, latents: Encoded, config: Watch, seed: int) -> None:
        """`pipeline` with its VAE only; image i has the caption of sample `chosen[i]`, drawn by the seed."""
        self._latents, self._config = latents, config
        self._chosen = indices(seed, 0, config.images, len(latents))
        captions = tuple(latents.captions.take(self._chosen).to_pylist())
        super().__init__(
            pipeline, PromptSet(captions, len(set(captions)), "captions"), seed=seed, batch_size=config.batch_size, tick=lambda _: None
        )

    def on_other_noise(self) -> "EncodedSampler":
        """The same captions with other noise."""
        other = EncodedSampler(self.pipeline, self._latents, self._config, self.seed)
        other.seed = derive_seed(self.seed, "reference")
        return other

    def pictures(self, row: SampledRow, denoiser: Denoiser, count: int) -> Iterator[Pixels]:
        """The first `count` pictures (H, W, 3) of a row."""
        batches = (self.batch(row, denoiser, first) for first in range(0, count, self.batch_size))
        return islice((picture for batch in batches for picture in batch), count)

    def _conditioning(self, first: int) -> Conditioning:
        _, conditioning = self._latents.samples(self._chosen[first : first + self.batch_size])
        return conditioning.to(self.pipeline.device).with_time_ids(self.pipeline.time_ids())

    def _no_text(self) -> Conditioning:
        return self._latents.unconditional(1).to(self.pipeline.device).with_time_ids(self.pipeline.time_ids())


def fid_column(steps: int) -> str:
    """Column of the metrics: FID of the student with one of several step counts."""
    return f"{FID}_at_{steps}"


def strip(*lines: Sequence[Pixels]) -> bytes:
    """Lines of as many pictures of one size, side by side, as PNG; small ones enlarged, large ones reduced. Equal pictures give equal bytes."""
    cells = [[thumbnail(picture) for picture in pictures] for pictures in lines]
    width, height = cells[0][0].size
    canvas = Image.new("RGB", (len(cells[0]) * (width + _GAP) - _GAP, len(cells) * (height + _GAP) - _GAP), (255, 255, 255))
    for line, shown in enumerate(cells):
        for number, cell in enumerate(shown):
            canvas.paste(cell, (number * (width + _GAP), line * (height + _GAP)))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _bias(features: NDArray[np.float32]) -> str:
    """Of FIDs to a reference with these features, (N, D): what they lack, and how far apart its halves are, which are of one model."""
    warning = bias_warning(*features.shape) or ""
    half = len(features) // 2
    if half < 2:
        return warning
    apart = frechet_distance(FeatureStatistics.of(features[:half]), FeatureStatistics.of(features[half : 2 * half]))
    return f"{warning} Two halves of the teacher's own samples, {half} each, are at FID {apart:.4g}, and are of one model.".strip()


def _look(step: int) -> str:
    return f"watch.look-{step:08d}"
