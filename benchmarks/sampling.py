"""Pictures a second of the stage `evaluate`'s sampling, beside what it cannot do without: `python -m benchmarks.sampling`.

A student (the UNet of recipes/tiny_teacher on the trailing grid, unguided) is sampled in two ways in turn in one process, round after round: by
the stage's own function for one row (noise of every image's own generator, scheduler, decoding, rounding, PNG, shards that are kept for a killed
run), and as bare passes of the network, one a step, and of the decoder, on a batch that lies ready. Texts are encoded before the first round, as
the stage encodes them once for all rows. Every second round is in the opposite order. The last line is JSON: `vs_bare_passes` is the stage's
pictures a second over those of the bare passes, the median over rounds of wall times; `vs_bare_passes_processor` the same of this process's time
on its cores, which another job on the machine disturbs less.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.interleaved import Times
from benchmarks.pairs import CAPTIONS, TINY_TEACHER, timed
from infra.store import ArtifactStore
from infra.torchvision_ops import define_missing_ops
from schemas.base import digest
from schemas.lightning import trailing_timesteps
from schemas.manifest import Lineage
from stages.diffusion.denoiser import added_conditions
from stages.diffusion.pipeline import TeacherPipeline
from stages.evaluate.pieces import Pieces
from stages.evaluate.prompts import assign
from stages.evaluate.rows import Row
from stages.evaluate.samples import Sampler, sample_row
from stages.workspace import Workspace

define_missing_ops()


class Setup:
    """What both ways work on."""

    def __init__(self, folder: Path, device: str, *, images: int, batch_size: int, steps: int) -> None:
        self.folder, self.device, self.images, self.batch_size, self.steps = folder, torch.device(device), images, batch_size, steps
        self.pipeline = TeacherPipeline.load(TINY_TEACHER, device)
        self.row = Row("student", "student", steps, trailing_timesteps(steps), "trailing", self.pipeline.facts.prediction_type, 1.0)
        prompts = assign(CAPTIONS, images, 1, "captions")
        self.sampler = Sampler(self.pipeline, prompts, seed=0, batch_size=batch_size, tick=lambda _images: None)
        (folder / "scratch").mkdir()
        lineage = Lineage(stage="benchmark", node="benchmark", revision=1, config={}, inputs={})
        store = ArtifactStore.open(f"file://{folder / 'store'}")
        self.workspace = Workspace(store, digest("sampling"), lineage, folder / "scratch", device=device)

    def stage(self, round_: int) -> None:
        """One row, under a name of its own, so that nothing of an earlier one is taken over."""
        row = replace(self.row, model=f"student-{round_}")
        sample_row(row, self.pipeline.denoiser, self.sampler, Pieces(self.workspace), self.folder / "samples" / row.slug)

    def bare(self) -> Callable[[int], None]:
        """The passes of the networks alone, on as many pictures."""
        unet: Any = self.pipeline.unet
        given = self.pipeline.conditioning([CAPTIONS[image % len(CAPTIONS)] for image in range(self.batch_size)])
        latents = torch.randn(self.batch_size, *self.pipeline.latent_shape, device=self.device)
        timesteps = torch.full((self.batch_size,), 499, device=self.device)
        added = added_conditions(unet, given, given.prompt_embeds.dtype)

        @torch.inference_mode()
        def passes(_round: int) -> None:
            for _ in range(self.images // self.batch_size):
                for _ in range(self.steps):
                    unet(latents, timesteps, encoder_hidden_states=given.prompt_embeds, added_cond_kwargs=added, return_dict=False)
                self.pipeline.vae.decode(latents, return_dict=False)

        return passes


def measure(setup: Setup, rounds: int) -> dict[str, float]:
    """Sample in both ways in turn. A round before the first is not counted."""
    arms: dict[str, Callable[[int], None]] = {"stage": setup.stage, "bare_passes": setup.bare()}
    for arm in arms.values():
        arm(0)
    found: dict[str, list[Times]] = {name: [] for name in arms}
    for round_ in range(1, rounds + 1):
        for name in list(arms) if round_ % 2 else reversed(list(arms)):
            found[name].append(timed(arms[name], round_, setup.device))
    figures = {f"{name}_images_per_second": setup.images / statistics.median(one.wall for one in times) for name, times in found.items()}
    both = list(zip(found["bare_passes"], found["stage"], strict=True))
    figures["vs_bare_passes"] = statistics.median(bare.wall / ours.wall for bare, ours in both)
    figures["vs_bare_passes_processor"] = statistics.median(bare.processor / ours.processor for bare, ours in both)
    return figures


def main() -> None:
    """Print a table for people, and the figures as the last line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=200, help="of a round, a multiple of the batch; 1,000 in all rounds by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8, help="evaluate.batch_size")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    if given.images % given.batch_size:
        parser.error(f"--images {given.images}: expected a multiple of --batch-size {given.batch_size}")
    with tempfile.TemporaryDirectory(prefix="sampling-") as place:
        setup = Setup(Path(place), given.device, images=given.images, batch_size=given.batch_size, steps=given.steps)
        figures = measure(setup, given.rounds)
    for name, value in figures.items():
        sys.stdout.write(f"{name:34} {value:10.3f}\n")
    sys.stdout.write(json.dumps({name: round(value, 3) for name, value in figures.items()}) + "\n")


if __name__ == "__main__":
    main()
