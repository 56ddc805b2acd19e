"""The whole chain small enough to be run many times, and its command line in a process group that can be killed as a machine kills."""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from infra.demo.emoji import write_collection
from infra.store import ArtifactStore
from schemas.manifest import Manifest
from tests import tiny_pipelines
from tests.forks import Fork, fork

ROOT = Path(__file__).resolve().parents[2]
NODES = ("ingest", "measure", "select", "teacher", "encode", "lightning-8-4", "lightning-4-2", "lcm", "evaluate", "publish")
"""The runs of the recipe in order."""
CHAIN = (
    *("lightning-32-16-lora", "lightning-32-16-unet"),
    *(f"lightning-{link}-{phase}" for link in ("16-8", "8-4", "4-2") for phase in ("conditional", "lora", "unet")),
    *("lightning-2-1-conditional", "lightning-2-1-unet"),
)
"""The runs of the adversarial recipe's chain in order."""
ADVERSARIAL_NODES = (*NODES[:5], *CHAIN, *NODES[-3:])
POLL_SECONDS = 0.005
_COMMAND = "from flows.cli import main; main()"
MARK = "DISTILL_TEST_COMMAND"
_LIMIT_SECONDS = 600
_TRAINING = {"training_steps": 12, "batch_size": 4, "checkpoint_every": 4, "log_every": 4}


def write_inputs(folder: Path) -> Path:
    """Write a random SDXL-type teacher and pictures of three sizes below `folder`; return the pictures' folder."""
    tiny_pipelines.save("sdxl", folder / "teacher")
    write_collection(folder / "pictures", 28, (96, 128, 160), seed=0)
    whole = (folder / "pictures" / "000001.png").read_bytes()
    (folder / "pictures" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    return folder / "pictures"


def write_recipe(folder: Path, port: int) -> Path:
    """Write the table of the pictures served at `port`, a dead address and a broken file among them, and the recipe, whose path is returned."""
    rows = pq.read_table(folder / "pictures" / "collection.parquet").to_pylist()
    rows += [dict(rows[0], file="gone.png"), dict(rows[0], file="truncated.png")]
    table = [{"url": f"http://127.0.0.1:{port}/{row.pop('file')}", "aesthetic": 6.0, **row} for row in rows]
    pq.write_table(pa.Table.from_pylist(table), folder / "urls.parquet")
    recipe: dict[str, Any] = {
        "name": "nano",
        "seed": 3,
        "ingest": {
            "table": str(folder / "urls.parquet"),
            "min_side_px": 90,
            "allow_private_addresses": True,
            "timeout_seconds": 5,
            "retries": 0,
            "shard_images": 10,
            "processes": 1,
            "threads": 8,
        },
        "measure": {"analysis_px": 64, "processes": 1},
        "select": {"min_side_px": 100, "min_sharpness": 0, "min_high_frequency": 0, "captions": {"min_characters": 3}},
        "teacher": {"source": str(folder / "teacher")},
        "encode": {"batch_size": 4, "shard_samples": 6},
        "lightning": _TRAINING | {"chain": [8, 4, 2], "ema_decay": 0.9, "optimizer": {"learning_rate": 1e-4}},
        "lcm": _TRAINING | {"lora_rank": 4, "lora_alpha": 4, "steps": [4, 2], "warmup_steps": 2},
        "evaluate": {"prompt_count": 8, "teacher_steps": [4, 2], "extractor": "efficientnet-lite0", "grid_prompts": 2, "batch_size": 4},
        "publish": {"name": "nano"},
    }
    path = folder / "nano.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def write_adversarial(recipe: Path) -> Path:
    """Write the recipe with a chain of adversarial phases, every kind of them, beside it."""
    settings = yaml.safe_load(recipe.read_text())
    settings["lightning"] = _TRAINING | {
        "chain": [32, 16, 8, 4, 2, 1],
        "checkpoint_every": 3,
        "ema_decay": 0.9,
        "lora_rank": 4,
        "lora_alpha": 4,
        "optimizer": {"learning_rate": 1e-4},
        "adversarial": {"lora_learning_rate": 1e-4, "unet_learning_rate": 1e-4, "conversion_steps": 6},
    }
    settings["publish"] = {"name": "nano-lightning"}
    path = recipe.with_name("nano-lightning.yaml")
    path.write_text(yaml.safe_dump(settings))
    return path


@dataclass(frozen=True)
class Place:
    """A store, with a read cache and a folder for temporary files of its own, and the command line working there."""

    folder: Path
    recipe: Path
    server: str
    """Address of the Prefect server."""
    address: str
    environment: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def store(self) -> ArtifactStore:
        return ArtifactStore.open(self.address)

    @property
    def surroundings(self) -> dict[str, str]:
        """Environment of a process that works here."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "DISTILL", "AWS"))}
        environment |= {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
        environment |= {"PREFECT_API_URL": self.server, "PREFECT_HOME": str(self.folder / "prefect")}
        environment |= {"XDG_CACHE_HOME": str(self.folder / "cache"), "TMPDIR": str(self.folder / "tmp")}
        return environment | {"DISTILL_STORE_ADDRESS": self.address, **self.environment}

    def start(self, *arguments: str, program: str = _COMMAND, fresh: bool = False) -> "Command":
        """Start `distill ARGUMENTS`, or another program, in a process group of its own: forked, or with `fresh` from nothing."""
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
        mark = uuid.uuid4().hex
        output, log = self.folder / f"{mark}.out", self.folder / f"{mark}.log"
        surroundings = self.surroundings | {MARK: mark}
        if not fresh:
            return Command(
                fork(program, *arguments, folder=self.folder, environment=surroundings, output=output, log=log), mark, output, log
            )
        with output.open("wb") as stdout, log.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-c", program, *arguments],
                cwd=self.folder,
                env=surroundings,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        return Command(process, mark, output, log)

    def run(self, *arguments: str, program: str = _COMMAND, fresh: bool = False) -> "Command":
        """Run `distill ARGUMENTS`, or another program, to its end, which must be good."""
        command = self.start(*arguments, program=program, fresh=fresh)
        assert command.wait() == 0, command.told
        return command

    def manifests(self) -> dict[str, Manifest]:
        """The artifacts on the store by the name of the run that made each. Only where each run has made one."""
        found = {manifest.lineage.node: manifest for manifest in self.store.manifests()}
        assert len(found) == len(list(self.store.manifests()))
        return found


@dataclass(frozen=True)
class Command:
    """A command that runs, or has run."""

    process: subprocess.Popen[bytes] | Fork
    mark: str
    """In the environment of what it starts, whatever group or session that goes to; what is only forked stays in its group."""
    output: Path
    log: Path

    @property
    def told(self) -> str:
        """What it has written to stderr so far."""
        return self.log.read_text(errors="replace")

    @property
    def started(self) -> list[str]:
        """Names of the runs whose stages it has started, in order."""
        return started_runs(self.told)

    def wait(self) -> int:
        """Wait for its end; its exit code. Whatever it started has to have ended with it."""
        try:
            return self.process.wait(timeout=_LIMIT_SECONDS)
        finally:
            self.kill()

    def wait_until(self, condition: Callable[[], bool], seconds: float = _LIMIT_SECONDS) -> bool:
        """Wait until the condition holds; False where the command or the time ends before."""
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def kill_after(self, run: str, seconds: float, once: Callable[[], bool] = lambda: True) -> int:
        """End it by SIGKILL so long after it has begun with the stage run and `once` is true; its exit code, another where it came to its end before.

        Only the command itself is killed: what it started has to end by itself, and is waited for.
        """
        begun = self.wait_until(lambda: run in self.started and once())
        assert begun or self.process.poll() is not None, self.told
        until = time.monotonic() + seconds
        self.wait_until(lambda: time.monotonic() >= until)
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
        code = self.process.wait(timeout=_LIMIT_SECONDS)
        self._wait_for_orphans()
        return code

    def kill(self) -> None:
        """End its process group by SIGKILL, if it still runs, and see that nothing it started in other groups outlives it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._wait_for_orphans()

    def processes(self) -> dict[int, str]:
        """The command and everything it started that lives: command lines by process id."""
        looked_for = f"{MARK}={self.mark}".encode()
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if looked_for in (process / "environ").read_bytes() or os.getpgid(int(process.name)) == self.process.pid:
                    found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # ended, or another user's
                continue
        return {pid: line for pid, line in found.items() if line}  # without those that have ended and are not yet asked for

    def _wait_for_orphans(self) -> None:
        end = time.monotonic() + 10
        while orphans := self.processes():
            assert time.monotonic() < end, f"outlived kill -9 of the command that started them: {orphans}"
            time.sleep(POLL_SECONDS)


def started_runs(told: str) -> list[str]:
    """Names of the runs whose stages a log says were started, in order."""
    return re.findall(r"(\S+): started [0-9a-f]{12}\b", told)


def assert_whole(place: Place) -> None:
    """Every artifact that can be seen has all its bytes."""
    for manifest in place.store.manifests():
        assert place.store.verify(manifest) == [], manifest.lineage.node


def assert_same(place: Place, expected: Mapping[str, Manifest]) -> None:
    """The store holds these artifacts, each with the same identity, facts and bytes."""
    assert_whole(place)
    found = place.manifests()
    assert {name: manifest.identity for name, manifest in found.items()} == {name: expected[name].identity for name in expected}
    for name, manifest in found.items():
        assert manifest.content == expected[name].content, name
        assert {entry.path: entry.sha256 for entry in manifest.files} == {entry.path: entry.sha256 for entry in expected[name].files}, name
        assert manifest.files_digest == expected[name].files_digest, name
