"""Twenty times kill -9 at random moments of the data stages, on a real object store: the same digests as undisturbed."""

import logging
import random
import signal
from pathlib import Path

import pytest

from tests.e2e.conftest import Nano
from tests.e2e.nano import Place, assert_same, assert_whole
from tests.services import ObjectStore

logger = logging.getLogger(__name__)
pytestmark = [pytest.mark.slow, pytest.mark.service]

KILLS = {"ingest": 7, "measure": 4, "select": 3, "encode": 6}
"""How often each is killed."""


def test_killed_twenty_times_at_random(
    nano: Nano, undisturbed: Place, seaweedfs: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in seaweedfs.environment.items():
        monkeypatch.setenv(name, value)  # for reading here
    expected = {name: manifest for name, manifest in undisturbed.manifests().items() if name in {*KILLS, "teacher"}}
    place = Place(tmp_path, nano.recipe, nano.server, f"s3://{seaweedfs.bucket}/kills", seaweedfs.environment)
    seed = random.SystemRandom().getrandbits(32)
    logger.info("seed of the moments: %d", seed)
    moments = random.Random(seed)
    assert sum(KILLS.values()) == 20
    place.run("stage", "teacher", str(nano.recipe))
    for stage, kills in KILLS.items():
        for _ in range(kills):
            kill_at_random(place, stage, expected[stage].lineage.cost.wall_seconds, moments)
            assert_whole(place)
        place.run("stage", stage, str(nano.recipe))
    assert_same(place, expected)


def kill_at_random(place: Place, stage: str, seconds: float, moments: random.Random) -> None:
    """Kill the stage once while it works; one that had ended before is made to begin again."""
    told = ""
    for _ in range(10):
        for manifest in list(place.store.manifests()):
            if manifest.lineage.node == stage:  # the command before was killed at its very end, or not in time
                place.store.remove(manifest.identity)
        child = place.start("stage", stage, str(place.recipe))
        code = child.kill_after(stage, moments.random() * seconds)
        told = child.told
        if code == -signal.SIGKILL:
            return
        assert code == 0, told
    pytest.fail(f"{stage} was always finished before it was killed; the last run's log:\n{told}")
