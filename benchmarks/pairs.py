"""Pairs a second of the stage `pairs`, beside what they cannot do without and what anybody would write: `python -m benchmarks.pairs`.

Three things are done in turn in one process, round after round, each for the same number of pairs of recipes/tiny_teacher with the same captions,
sampler, steps, guidance and batch: the stage's own function for one shard (reading text, noise, sampling, writing and keeping the shard); the bare
passes of the same UNet on a doubled batch that lies ready, as many as the sampler calls; and a plain loop over diffusers' pipeline with
output_type="latent", which keeps nothing. The last line is JSON: `vs_bare_passes` and `vs_pipeline_loop`, the stage's pairs a second over theirs,
medians over rounds of wall times; with `_processor` of this process's time on its cores, which another job on the machine disturbs less.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from benchmarks.interleaved import Times, wait
from infra.store import ArtifactStore
from infra.torchvision_ops import define_missing_ops
from schemas.base import digest
from schemas.manifest import Latents, Lineage, Manifest
from schemas.pairs import PairsConfig
from stages.diffusion.denoiser import added_conditions
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.sampling import image_generator, make_scheduler
from stages.pairs.content import planned_content
from stages.pairs.shard import Work, draw_shard, loaded_drawer
from stages.teacher import describe
from stages.workspace import Workspace

define_missing_ops()

from diffusers import DiffusionPipeline  # noqa: E402 - after the operators that it asks for

TINY_TEACHER: Final = Path(__file__).parents[1] / "recipes" / "tiny_teacher"
CAPTIONS: Final = tuple(
    f"{colour} {thing}" for thing in ("apple", "car", "fox", "key", "sun", "tree") for colour in ("red", "blue", "green")
)


@dataclass(frozen=True)
class Setup:
    """What all three work on."""

    config: PairsConfig
    work: Work
    device: torch.device

    @classmethod
    def make(cls, config: PairsConfig, folder: Path, device: str) -> "Setup":
        """Put the teacher and an encoded set of `CAPTIONS` on a store in the folder."""
        store = ArtifactStore.open(f"file://{folder / 'store'}")
        teacher = store.publish(TINY_TEACHER, identity=digest("teacher"), content=describe(TINY_TEACHER), lineage=_lineage())
        pipeline = TeacherPipeline.load(TINY_TEACHER, device)
        latents = _encoded(pipeline, teacher.identity, folder / "latents", store)
        (folder / "scratch").mkdir()
        content = planned_content(
            config, pipeline.facts, pipeline.latent_shape, seed=0, device=device, teacher=teacher.identity, latents=latents.identity
        )
        workspace = Workspace(store, digest("pairs"), _lineage(), folder / "scratch", device=device)
        work = Work(content, teacher, latents, workspace, (device,), torch.get_num_threads())  # type: ignore[arg-type]
        return cls(config, work, torch.device(device))

    def stage(self, round_: int) -> None:
        """One shard, as a process of the stage makes it."""
        draw_shard(round_, self.work)

    def bare(self) -> Callable[[int], None]:
        """The passes of the network alone."""
        drawer, batch = loaded_drawer(self.work), self.work.content.batch_size
        pipeline = TeacherPipeline.load(TINY_TEACHER, self.device)
        doubled = 2 if self.config.guidance_scale > 1 else 1
        given = pipeline.conditioning([CAPTIONS[pair % len(CAPTIONS)] for pair in range(doubled * batch)])
        unet: Any = drawer.denoiser.unet  # type: ignore[attr-defined]
        x = torch.randn(doubled * batch, *self.work.content.latent_shape, device=self.device)
        t = torch.full((doubled * batch,), 499, device=self.device)
        added = added_conditions(unet, given, given.prompt_embeds.dtype)

        @torch.inference_mode()
        def passes(_round: int) -> None:
            for _ in range(self.config.shard_pairs // batch * self.config.network_calls):
                unet(x, t, encoder_hidden_states=given.prompt_embeds, added_cond_kwargs=added, return_dict=False)

        return passes

    def loop(self) -> Callable[[int], None]:
        """The pipeline as it is loaded, batch after batch."""
        pipeline: Any = DiffusionPipeline.from_pretrained(TINY_TEACHER).to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        prediction = pipeline.scheduler.config.prediction_type
        pipeline.scheduler = make_scheduler(self.config.sampler, dict(pipeline.scheduler.config), prediction)
        batch = self.work.content.batch_size

        def pictures(round_: int) -> None:
            pairs = self.work.numbers(round_)
            for first in range(pairs.start, pairs.stop, batch):
                numbers = range(first, first + batch)
                pipeline(
                    [CAPTIONS[pair % len(CAPTIONS)] for pair in numbers],
                    generator=[image_generator(0, pair) for pair in numbers],
                    num_inference_steps=self.config.steps,
                    guidance_scale=self.config.guidance_scale,
                    output_type="latent",
                )

        return pictures


def _encoded(pipeline: TeacherPipeline, teacher: str, folder: Path, store: ArtifactStore) -> Manifest[Any]:
    """Captions with the teacher's embeddings, as `encode` leaves them, beside latents that nobody reads."""
    folder.mkdir()
    text, nothing, count = pipeline.encode_prompts(CAPTIONS).to("cpu"), pipeline.unconditional().to("cpu"), len(CAPTIONS)
    assert text.pooled is not None and nothing.pooled is not None, "the tiny teacher is of SDXL's type"
    shard = "latents-00000.safetensors"
    tensors = {"latents": torch.zeros(count, *pipeline.latent_shape), "prompt_embeds": text.prompt_embeds, "pooled": text.pooled}
    save_file(tensors, folder / shard)
    save_file({"prompt_embeds": nothing.prompt_embeds, "pooled": nothing.pooled}, folder / "unconditional.safetensors")
    place = {"shard": [shard] * count, "row": list(range(count)), "text_shard": [shard] * count, "text_row": list(range(count))}
    pq.write_table(pa.table(place | {"caption": list(CAPTIONS)}), folder / "index.parquet")
    _, tokens, features = text.prompt_embeds.shape
    content = Latents(
        samples=count, shards=1, latent_shape=pipeline.latent_shape, text_tokens=tokens, text_features=features, teacher=teacher
    )
    return store.publish(folder, identity=digest("latents"), content=content, lineage=_lineage())


def _lineage() -> Lineage:
    return Lineage(stage="benchmark", node="benchmark", revision=1, config={}, inputs={})


def timed(what: Callable[[int], None], round_: int, device: torch.device) -> Times:
    """Seconds of one round."""
    wait(device)
    before = Times(time.perf_counter(), time.process_time())
    what(round_)
    wait(device)
    return Times(time.perf_counter(), time.process_time()).after(before)


def measure(setup: Setup, rounds: int) -> dict[str, float]:
    """Do all three in turn; every second round in the opposite order. A round before the first is not counted."""
    arms: dict[str, Callable[[int], None]] = {"stage": setup.stage}
    setup.stage(0)
    arms |= {"bare_passes": setup.bare(), "pipeline_loop": setup.loop()}
    for name in ("bare_passes", "pipeline_loop"):
        arms[name](0)
    found: dict[str, list[Times]] = {name: [] for name in arms}
    for round_ in range(1, rounds + 1):
        for name in list(arms) if round_ % 2 else reversed(list(arms)):
            found[name].append(timed(arms[name], round_, setup.device))
    pairs = setup.config.shard_pairs
    figures = {f"{name}_pairs_per_second": pairs / statistics.median(one.wall for one in times) for name, times in found.items()}
    for name in ("bare_passes", "pipeline_loop"):
        both = list(zip(found[name], found["stage"], strict=True))
        figures[f"vs_{name}"] = statistics.median(theirs.wall / ours.wall for theirs, ours in both)
        figures[f"vs_{name}_processor"] = statistics.median(theirs.processor / ours.processor for theirs, ours in both)
    return figures


def main() -> None:
    """Print a table for people, and the figures as the last line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pairs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=32, help="of a round, a multiple of the batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--sampler", choices=("ddim", "pndm", "heun", "dpmpp"), default="pndm")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    if given.pairs % given.batch_size:
        parser.error(f"--pairs {given.pairs}: expected a multiple of --batch-size {given.batch_size}")
    config = PairsConfig(
        count=given.pairs * (given.rounds + 1),
        sampler=given.sampler,
        steps=given.steps,
        batch_size=given.batch_size,
        shard_pairs=given.pairs,
    )
    with tempfile.TemporaryDirectory(prefix="pairs-") as place:
        figures = measure(Setup.make(config, Path(place), given.device), given.rounds)
    for name, value in figures.items():
        sys.stdout.write(f"{name:34} {value:10.3f}\n")
    sys.stdout.write(json.dumps({name: round(value, 3) for name, value in figures.items()}) + "\n")


if __name__ == "__main__":
    main()
