"""Pairs that two workers of a pool draw together, one of them killed: the digests of one process."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from schemas.base import digest
from tests.e2e.conftest import Nano
from tests.e2e.nano import Command, Place, assert_same

pytestmark = [pytest.mark.slow, pytest.mark.service]

POOL = "drawers"
UNTIL = "import sys; from flows.chain import distill_chain; distill_chain(sys.argv[1], until='pairs')"
PAIRS = {"count": 160, "sampler": "ddim", "steps": 10, "batch_size": 2, "shard_pairs": 4}


@pytest.fixture
def alone(nano: Nano, undisturbed: Place, tmp_path: Path) -> Place:
    """One process has drawn them, without Prefect."""
    place = with_pairs(nano.copied(undisturbed, tmp_path / "alone"))
    place.run("stage", "pairs", str(place.recipe))
    return place


@pytest.fixture
def shared(nano: Nano, undisturbed: Place, tmp_path: Path) -> Iterator[Place]:
    """A recipe that has them drawn by two workers, which are there."""
    place = with_pairs(nano.copied(undisturbed, tmp_path / "shared"), workers=2)
    place.run("deploy", "--pool", "cpu", "--pool", POOL)
    with ExitStack() as stack:
        for _ in range(2):
            worker = place.start("worker", POOL, "--limit", "1")
            stack.callback(stop, worker)
        yield place


def with_pairs(place: Place, **changes: Any) -> Place:
    settings = yaml.safe_load(place.recipe.read_text()) | {"pairs": PAIRS | changes}
    if changes:
        settings["pools"] = {"pairs": POOL}
    recipe = place.folder / "pairs.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    return replace(place, recipe=recipe)


def stop(worker: Command) -> None:
    worker.process.terminate()
    worker.wait()


def test_two_workers_one_killed_make_what_one_process_makes(alone: Place, shared: Place) -> None:
    expected = {manifest.lineage.node: manifest for manifest in alone.store.manifests()}
    identity = expected["pairs"].identity
    chain = shared.start(str(shared.recipe), program=UNTIL)
    share, first = wait(chain, lambda: next(((share, pid) for share in ("1/2", "2/2") if (pid := holder(shared, identity, share))), None))
    wait(chain, lambda: any(part.name.startswith("pairs-") for part in shared.store.parts(identity)))
    os.kill(first, signal.SIGSTOP)  # it would have drawn all of its share before the other worker's process is there
    other = "2/2" if share == "1/2" else "1/2"
    assert wait(chain, lambda: holder(shared, identity, other)) != first
    os.kill(first, signal.SIGKILL)
    assert chain.wait() == 0, chain.told
    assert_same(shared, expected)
    cost = shared.store.resolve(identity).lineage.cost
    assert cost.attempts == 3, "both shares, and the run that made the artifact of them; the one that was killed could say nothing"


def holder(place: Place, identity: str, share: str) -> int | None:
    """Process that holds the share's lease."""
    lease = place.folder / "store" / "leases" / digest([identity, share])
    records = sorted(lease.glob("*.json"))
    try:
        return int(json.loads(records[-1].read_bytes())["pid"]) if records else None
    except (OSError, ValueError):  # replaced meanwhile
        return None


def wait(chain: Command, look: Callable[[], Any]) -> Any:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        if found := look():
            return found
        assert chain.process.poll() is None, chain.told
        time.sleep(0.01)
    pytest.fail(chain.told)
