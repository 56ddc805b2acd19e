"""Latent consistency distillation beside diffusers' script: `python -m benchmarks.lcm_race --script PATH [--rounds 2] [--steps 200] [--images 256]`.

Both train a LoRA of the teacher in recipes/tiny_teacher, on the same pictures, with the same batch, steps, rank, optimiser, guidance and solver
(`lcm` of recipes/tiny.yaml), in float32 on the CPU with the same number of threads (`OMP_NUM_THREADS`, else 1). PATH is
`examples/consistency_distillation/train_lcm_distill_lora_sdxl.py` of the repository huggingface/diffusers, at the tag of the installed version or
the newest before it; it is run unchanged, and needs `datasets` beside our own packages.

Ours is `distill stage lcm`, theirs the script, each a process of its own. In every round both train for a few steps and then for `--steps`; they take
turns of two seconds, the other one stopped meanwhile, so that what else the machine does slows both alike, and only their own time is counted.
The rate is what the difference of the two lengths took, so that start, loading and what is done once (saving, the script's last pictures) cancel;
beside it stand the whole longer runs, ours with the stage `encode`, which the script does again in every step. The students of the longer runs are
measured by the stage `evaluate`, with the same prompts and noise: FID to other samples of the teacher in 4 steps.

The last line is JSON: `samples_per_second_ratio` (ours over the script's), `processor_ratio` (the same of processor seconds, which other work on the
machine changes less), `total_ratio` (the script's whole longer runs over ours with `encode`), `fid_ours` and `fid_peer` (means over the rounds,
each of which has seeds of its own).
"""

import argparse
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Final

from benchmarks import lcm_race_peer as peer
from benchmarks.quality import evaluation
from flows.demo import PROJECT
from flows.preparation import Prepared, prepare
from infra.demo.server import serve
from infra.demo.table import make_collection, make_small_collection
from schemas.base import digest
from schemas.errors import DistillError, RunFailed
from schemas.lcm import LcmConfig
from schemas.loading import load_recipe
from schemas.manifest import Evaluation, Lineage, Manifest, StudentLoRA
from stages.runner import execute
from stages.selected import SelectedPictures
from stages.workspace import Workspace

SMALL, LARGE = (PROJECT / "recipes" / name for name in ("tiny-adversarial.yaml", "tiny.yaml"))
"""Recipes for small pictures and for those of `make demo`; their sections `lcm` are the same."""

STEPS: Final = 4
"""In which students are measured."""
RESOLUTION_PX: Final = 64
SETTINGS: Final = ("lightning=null", "publish=null", f"lcm.steps=[{STEPS}]", "lcm.checkpoint_every=500", "evaluate.teacher_steps=[32]")
SLICE_SECONDS: Final = 2.0
SHARED: Final = ("teacher", "ingest", "select", "encode")
"""Nodes whose artifacts an evaluation reads beside students."""


@dataclass(frozen=True)
class Times:
    """Seconds of a process, from its start to its end, and on its cores."""

    wall: float
    processor: float


@dataclass(frozen=True)
class Race:
    """What both sides train with, and where."""

    folder: Path
    recipe: Path
    prepared: Prepared
    made: Mapping[str, Manifest]
    overrides: tuple[str, ...]
    encode_seconds: float

    @property
    def config(self) -> LcmConfig:
        """The section `lcm`."""
        assert self.prepared.plan.recipe.lcm is not None, "the recipe has it"
        return self.prepared.plan.recipe.lcm

    def changed(self, steps: int, seed: int) -> tuple[str, ...]:
        """Overrides of one run: each has a seed, and with it an identity, of its own."""
        return (*self.overrides, f"lcm.training_steps={steps}", f"lcm.seed={seed}")

    def ours(self, steps: int, seed: int) -> list[str]:
        """The command that trains."""
        settings = [argument for override in self.changed(steps, seed) for argument in ("--set", override)]
        store = self.prepared.surroundings.store.address
        return [sys.executable, "-c", "from flows.cli import main; main()", "stage", "lcm", str(self.recipe), "--store", store, *settings]

    def made_by_ours(self, steps: int, seed: int) -> Manifest[StudentLoRA]:
        """What that command made."""
        store = self.prepared.surroundings.store
        plan = prepare(load_recipe(self.recipe, self.changed(steps, seed)), store.address).plan
        manifest = store.find(plan.identities["lcm"])
        assert manifest is not None and isinstance(manifest.content, StudentLoRA), "the stage has made it"
        return manifest  # type: ignore[return-value]

    def output(self, steps: int, seed: int) -> Path:
        """Where the script puts what it makes."""
        return self.folder / f"peer-{steps}-{seed}"

    def theirs(self, script: Path, steps: int, seed: int) -> list[str]:
        """The command that trains by the script."""
        config = self.config.model_copy(update={"training_steps": steps})
        teacher, pictures = PROJECT / "recipes" / "tiny_teacher", self.folder / "peer-pictures"
        output = self.output(steps, seed)
        return peer.command(script, teacher, pictures, output, config=config, resolution_px=RESOLUTION_PX, seed=seed)

    def adopt(self, output: Path, like: Manifest[StudentLoRA], seed: int) -> Manifest:
        """Put the script's student on the store: ours in all that a sampler must know."""
        identity = digest({"peer": output.name, "like": like.identity, "seed": seed})
        content = like.content
        lineage = Lineage(stage="lcm", node=f"peer-{seed}", revision=0, config={"script": peer.PLACE}, inputs={})
        target = self.folder / f"{output.name}-student"
        peer.convert(output, PROJECT / "recipes" / "tiny_teacher", target, rank=content.rank, alpha=content.alpha)
        return self.prepared.surroundings.store.publish(target, identity=identity, content=content, lineage=lineage)


def in_turn(commands: Sequence[Sequence[str]]) -> list[Times]:
    """Run processes to their ends, one at a time for `SLICE_SECONDS` each, the others stopped meanwhile: other work on the machine slows all alike.

    Raises `RunFailed` with the end of what one said that failed.
    """
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    threads = {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    wall, processor = [0.0] * len(commands), [0.0] * len(commands)
    with ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in commands]
        running: dict[int, subprocess.Popen[bytes]] = {}
        left = list(range(len(commands)))
        stack.callback(lambda: [process.kill() for process in running.values() if process.poll() is None])
        while left:
            for number in list(left):
                started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
                if number in running:
                    running[number].send_signal(signal.SIGCONT)
                else:
                    running[number] = subprocess.Popen(
                        commands[number],
                        stdout=said[number],
                        stderr=subprocess.STDOUT,
                        cwd=PROJECT,
                        env={**os.environ, **offline, **threads},
                    )
                try:
                    code = running[number].wait(SLICE_SECONDS)
                except subprocess.TimeoutExpired:
                    running[number].send_signal(signal.SIGSTOP)
                    wall[number] += time.perf_counter() - started
                    continue
                wall[number] += time.perf_counter() - started
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                processor[number] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                left.remove(number)
                if code != 0:
                    said[number].seek(0)
                    raise RunFailed(
                        f"{' '.join(commands[number][:6])} ... ended with {code}:\n{said[number].read().decode(errors='replace')[-3000:]}"
                    )
    return [Times(*pair) for pair in zip(wall, processor, strict=True)]


def prepared_race(folder: Path, pictures: int | None) -> Race:
    """Draw so many small pictures, or those of the demo, fetch, select and encode them, and write the selected ones for the script."""
    recipe = LARGE if pictures is None else SMALL
    collection = make_collection(folder) if pictures is None else make_small_collection(folder, count=pictures, seed=2)
    overrides = (f"ingest.table={collection.table}", *SETTINGS)
    prepared = prepare(load_recipe(recipe, overrides), f"file://{folder / 'store'}")
    made: dict[str, Manifest] = {}
    encode_seconds = 0.0
    with serve(collection.pictures, collection.port):
        for node in prepared.plan.nodes[: [node.name for node in prepared.plan.nodes].index("encode") + 1]:
            started = time.perf_counter()
            made[node.name] = execute(prepared.plan, node, prepared.surroundings, made)
            encode_seconds = time.perf_counter() - started
    lineage = Lineage(stage="benchmark", node="benchmark", revision=1, config={}, inputs={})
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        place = Workspace(prepared.surroundings.store, digest("pictures"), lineage, Path(scratch))
        selected = SelectedPictures.open(made["ingest"], made["select"], place)  # type: ignore[arg-type]  # their kinds are the plan's
        assert len(selected) == made["encode"].content.samples, "all that are selected are encoded"  # type: ignore[union-attr]
        peer.write_pictures(selected, folder / "peer-pictures")
    return Race(folder, recipe, prepared, made, overrides, encode_seconds)


@dataclass(frozen=True)
class Rate:
    """One side's runs: (short, long) of every round."""

    rounds: list[tuple[Times, Times]]
    samples: int
    """That the longer runs took more than the short ones, all rounds together."""

    def per_second(self, clock: str) -> float:
        """By `wall` or `processor`."""
        return self.samples / sum(getattr(long, clock) - getattr(short, clock) for short, long in self.rounds)


def race(script: Path, setting: Race, *, rounds: int, short: int, long: int) -> tuple[Rate, Rate, dict[str, Manifest]]:
    """Let both run in turn; returns ours, theirs, and the longer runs' students by name."""
    of_ours: list[tuple[Times, Times]] = []
    of_theirs: list[tuple[Times, Times]] = []
    students: dict[str, Manifest] = {}
    for number in range(rounds):
        taken: dict[int, list[Times]] = {}
        for steps in (short, long):
            taken[steps] = in_turn([setting.ours(steps, number), setting.theirs(script, steps, number)])
            logging.info("round %d, %d steps: ours %.1f s, the script %.1f s", number + 1, steps, *(times.wall for times in taken[steps]))
        student = setting.made_by_ours(long, number)
        students |= {f"ours-{number}": student, f"peer-{number}": setting.adopt(setting.output(long, number), student, number)}
        for rate, before, after in zip((of_ours, of_theirs), taken[short], taken[long], strict=True):
            rate.append((before, after))
    batch, pictures = setting.config.batch_size, setting.made["encode"].content.samples  # type: ignore[union-attr]
    seen = [peer.samples_seen(steps, batch, pictures) for steps in (short, long)]
    return Rate(of_ours, rounds * batch * (long - short)), Rate(of_theirs, rounds * (seen[1] - seen[0])), students


def distances(setting: Race, students: Mapping[str, Manifest], images: int) -> dict[str, float]:
    """FID to other samples of the teacher by student, and of the teacher itself."""
    shared = {name: setting.made[name] for name in SHARED}
    measured = evaluation(setting.prepared.surroundings.store, setting.prepared.plan.recipe, shared, students, images)
    assert isinstance(measured.content, Evaluation)
    return {name.partition("@")[0]: scores["fid_teacher"] for name, scores in measured.content.scores.items()}


def main() -> None:
    """Print the table, and the figures as the last line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, required=True, help=f"{peer.PLACE} of the repository huggingface/diffusers")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200, help="of the longer runs")
    parser.add_argument("--short-steps", type=int, default=20, help="of the runs that are subtracted")
    parser.add_argument("--small", type=int, help="train on so many of 64 to 128 px; else the pictures of `make demo`, of 1088 to 1280")
    parser.add_argument("--images", type=int, default=256, help="sampled of each student")
    given = parser.parse_args()
    try:
        peer.check_script(given.script)
        with tempfile.TemporaryDirectory(prefix="lcm-race-") as place:
            setting = prepared_race(Path(place), given.small)
            ours, theirs, students = race(given.script.resolve(), setting, rounds=given.rounds, short=given.short_steps, long=given.steps)
            fids = distances(setting, students, given.images)
    except DistillError as error:
        sys.exit(f"error: {error}")
    means = {side: fmean(value for name, value in fids.items() if name.startswith(side)) for side in ("ours", "peer")}
    whole = {side: sum(long.wall for _, long in rate.rounds) / given.rounds for side, rate in (("ours", ours), ("peer", theirs))}
    whole["ours"] += setting.encode_seconds
    lines = [f"{'':<8}{'samples/s':>12}{'samples/processor-s':>22}{'whole run, s':>16}{'FID to teacher, 4 steps':>26}"]
    for side, rate in (("ours", ours), ("peer", theirs)):
        each = " ".join(f"{value:.1f}" for name, value in fids.items() if name.startswith(side))
        lines.append(f"{side:<8}{rate.per_second('wall'):>12.1f}{rate.per_second('processor'):>22.1f}{whole[side]:>16.1f}{each:>26}")
    lines.append(f"of ours, encode {setting.encode_seconds:.1f} s; the teacher itself in 32 steps: FID {fids['teacher']:.1f}")
    figures = {
        "samples_per_second_ratio": ours.per_second("wall") / theirs.per_second("wall"),
        "processor_ratio": ours.per_second("processor") / theirs.per_second("processor"),
        "total_ratio": whole["peer"] / whole["ours"],
        "fid_ours": means["ours"],
        "fid_peer": means["peer"],
    }
    sys.stdout.write("\n".join([*lines, json.dumps({name: round(value, 3) for name, value in figures.items()})]) + "\n")


if __name__ == "__main__":
    main()
