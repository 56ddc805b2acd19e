"""What SIGKILL at random moments does to a chain on pools: `python -m benchmarks.faults --kills 30`.

A server (SQLite), SeaweedFS and a worker of each of two pools, as `distill services up` starts them, and a small chain of real stages:
ingest, measure, select and teacher in the chain's own process on `cpu`; encode, and training by two processes of torch, as runs on `gpu`. It is run
once undisturbed for its artifacts. Each trial then starts it by the API on a store prefix of its own and, at a random moment of the undisturbed
run's duration (for a rank: after training has begun), kills one of the kinds
`worker` a pool's worker, cpu and gpu in turn, with all that it started: what a machine that is lost takes with it
`server` Prefect's server
`store`  the object store
`rank`   one of the two processes that train
and starts it again after a pause, but for a rank, which is another's to start again. Meanwhile every artifact that can be seen is read and verified.
The last line is JSON: `trials`, `completed` (chains that ended as completed, by themselves), `differing` (artifacts of other bytes than undisturbed,
or missing) and `half_written` (that could be seen and were not whole), and the same for each kind. Exit code 1 when a chain did not end well.
"""

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from benchmarks.fault_site import Fault, Site, Undisturbed, served_recipe, services
from benchmarks.processes import end_tidily
from infra.store import ArtifactStore
from schemas.errors import CorruptArtifact, DistillError
from schemas.manifest import Manifest

KINDS: Final = ("worker", "server", "store", "rank")
PAUSE_SECONDS: Final = (1.0, 15.0)


@dataclass(frozen=True)
class Outcome:
    """What became of a trial's chain."""

    fault: Fault
    state: str
    seconds: float
    differing: tuple[str, ...] = ()
    half_written: tuple[str, ...] = ()


class Watch(threading.Thread):
    """Looks for artifacts while a chain runs, and verifies each that can be seen."""

    def __init__(self, address: str, expected: Mapping[str, Manifest]) -> None:
        super().__init__(name="watch", daemon=True)
        self._store, self._left = ArtifactStore.open(address), dict(expected)
        self.half_written: list[str] = []
        self.ended = threading.Event()

    def run(self) -> None:
        """Until the chain has ended."""
        while not self.ended.wait(1.0):
            self.look()

    def look(self) -> None:
        """Verify what can be seen by now and was not before."""
        for name, manifest in list(self._left.items()):
            with contextlib.suppress(DistillError, OSError):  # the store may be what was killed
                if self._is_seen(name, manifest.identity):
                    del self._left[name]

    def _is_seen(self, name: str, identity: str) -> bool:
        try:
            found = self._store.find(identity)
            problems = [] if found is None else self._store.verify(found)
        except CorruptArtifact as error:
            problems = [str(error)]
        if problems:
            self.half_written.append(f"{name}: {problems[0]}")
        return bool(problems) or found is not None


def differences(store: ArtifactStore, expected: Mapping[str, Manifest]) -> list[str]:
    """Names of the artifacts that are not there, are not whole, or have other facts or bytes."""
    found = {manifest.lineage.node: manifest for manifest in store.manifests()}
    return [
        name
        for name, manifest in expected.items()
        if name not in found
        or (found[name].identity, found[name].files_digest) != (manifest.identity, manifest.files_digest)
        or found[name].content != manifest.content
        or store.verify(found[name])
    ]


def plan_faults(kinds: Sequence[str], kills: int, seed: int) -> list[Fault]:
    """Draw the faults: the kinds in turn, each at a moment and with a pause of its own."""
    drawn = random.Random(seed)
    workers = ("worker-cpu", "worker-gpu")
    faults: list[Fault] = []
    for number in range(kills):
        kind = kinds[number % len(kinds)]
        service = workers[number // len(kinds) % 2] if kind == "worker" else kind
        faults.append(Fault(kind, service, drawn.random(), drawn.uniform(*PAUSE_SECONDS)))
    return faults


def try_fault(site: Site, fault: Fault, address: str, undisturbed: Undisturbed, patience: float) -> Outcome:
    """Run the chain once with a fault."""
    watch = Watch(address, undisturbed.artifacts)
    watch.start()
    started = time.monotonic()
    run = site.start(address)
    over, states = threading.Event(), list[str]()

    def follow() -> None:
        states.append(site.wait(run, patience))
        over.set()

    waiting = threading.Thread(target=follow, name="follow", daemon=True)
    waiting.start()
    site.strike(fault, undisturbed, over)  # in the main thread: what it starts ends with the thread that started it
    waiting.join()
    seconds = time.monotonic() - started
    watch.ended.set()
    watch.join()
    return Outcome(
        fault, states[0], seconds, tuple(differences(ArtifactStore.open(address), undisturbed.artifacts)), tuple(watch.half_written)
    )


def summary(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Count."""
    return {
        "trials": len(outcomes),
        "completed": sum(outcome.state == "Completed" for outcome in outcomes),
        "differing": sum(len(outcome.differing) for outcome in outcomes),
        "half_written": sum(len(outcome.half_written) for outcome in outcomes),
    }


def row(number: int, outcome: Outcome) -> str:
    """One trial for people."""
    fault, seconds = outcome.fault, f"{outcome.seconds:.0f} s"
    wrong = "; ".join([*(f"{name} differs" for name in outcome.differing), *outcome.half_written]) or "all as undisturbed"
    back = "" if fault.kind == "rank" else f", back after {fault.pause:.1f} s"
    return f"{number:3} {fault.service:11} at {fault.moment:.2f}{back}: {outcome.state} in {seconds}, {wrong}"


def main() -> int:
    """Run the trials, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--lost-after", type=int, default=45, help="seconds without a heartbeat after which a run is taken for lost")
    parser.add_argument("--patience", type=float, default=900.0, help="seconds that a chain may take")
    parser.add_argument("--keep", type=Path, help="folder for data and logs, which stay there")
    asked = parser.parse_args()
    end_tidily()
    with contextlib.ExitStack() as stack:
        folder = asked.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        folder.mkdir(parents=True, exist_ok=True)
        data = stack.enter_context(served_recipe(folder))
        site = stack.enter_context(services(folder, data, asked.lost_after))
        top = os.environ["DISTILL_STORE_ADDRESS"]
        started = time.monotonic()
        state = site.wait(site.start(f"{top}/undisturbed"), asked.patience)
        seconds = time.monotonic() - started
        if state != "Completed":
            raise SystemExit(f"the undisturbed chain: {state}; see {folder / 'logs'}")
        artifacts = {manifest.lineage.node: manifest for manifest in ArtifactStore.open(f"{top}/undisturbed").manifests()}
        undisturbed = Undisturbed(seconds, artifacts)
        _say(f"undisturbed: {len(artifacts)} artifacts in {seconds:.0f} s")
        outcomes: list[Outcome] = []
        for number, fault in enumerate(plan_faults(asked.kinds, asked.kills, asked.seed)):
            outcomes.append(try_fault(site, fault, f"{top}/trial-{number}", undisturbed, asked.patience))
            _say(row(number, outcomes[-1]))
            if asked.keep is not None:
                (folder / "outcomes.jsonl").open("a").write(json.dumps(asdict(outcomes[-1])) + "\n")
    figures = summary(outcomes)
    by_kind = {kind: summary([outcome for outcome in outcomes if outcome.fault.kind == kind]) for kind in asked.kinds}
    _say(json.dumps({**figures, "by_kind": by_kind}))
    return int(figures["completed"] < figures["trials"] or figures["differing"] > 0 or figures["half_written"] > 0)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
