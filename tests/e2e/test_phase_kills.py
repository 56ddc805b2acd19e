"""kill -9 at ten moments of every kind of phase of an adversarial chain: the same digests as undisturbed, and nothing else is made again."""

import logging
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from infra.store import StoreSettings
from infra.store.filesystem import open_storage
from schemas.manifest import Manifest
from tests.e2e.conftest import Nano
from tests.e2e.nano import Place, assert_whole
from tests.services import ObjectStore

logger = logging.getLogger(__name__)
pytestmark = [pytest.mark.slow, pytest.mark.service]

PHASES = (
    "lightning-2-1-unet",  # says x0 already, unconditional
    "lightning-2-1-conditional",  # after its conversion to x0
    "lightning-4-2-unet",  # from several timesteps, judged at several noise levels
    "lightning-4-2-lora",
    "lightning-4-2-conditional",
    "lightning-16-8-unet",  # from the LoRA, merged
    "lightning-16-8-lora",
    "lightning-16-8-conditional",  # a LoRA
    "lightning-32-16-unet",
    "lightning-32-16-lora",  # mean squared error with guidance
)
"""From the last to the first: one that fails leaves its artifact taken away, and none after it here reads that."""
KILLS = 10
SEED = 20


@pytest.fixture(scope="module")
def killing(nano: Nano, adversarial: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A copy of the chain's store."""
    return nano.copied(adversarial, tmp_path_factory.mktemp("killing"))


@pytest.mark.parametrize("name", PHASES)
def test_killed_at_ten_moments_of_a_phase(name: str, killing: Place, adversarial: Place) -> None:
    kill_at_ten_moments(killing, name, adversarial)


def test_killed_at_ten_moments_on_an_object_store(
    adversarial: Place, seaweedfs: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in seaweedfs.environment.items():
        monkeypatch.setenv(variable, value)  # for reading here
    place = replace(adversarial, folder=tmp_path, address=f"s3://{seaweedfs.bucket}/phases", environment=seaweedfs.environment)
    copy_store(adversarial.address, place.address)
    kill_at_ten_moments(place, "lightning-2-1-conditional", adversarial)


def kill_at_ten_moments(place: Place, name: str, undisturbed: Place) -> None:
    """Kill a run at a random moment of each tenth of its duration; where it had come to its end before, it is begun anew.

    The second five count from its first checkpoint: a machine that has grown slower since a run was timed would have all ten before it.
    """
    before = undisturbed.manifests()
    expected, command = before[name], ("stage", name, str(place.recipe))
    place.store.remove(expected.identity)
    ran = place.run(*command)
    seconds = float("inf")  # of the shortest whole run so far
    random_moments = random.Random(f"{SEED} {name}")
    kept: list[list[str]] = []
    resumed = ends = 0

    def checkpointed() -> bool:
        return bool(place.store.parts(expected.identity))

    for tenth in range(KILLS):
        fraction = (tenth % (KILLS // 2) + random_moments.random()) / KILLS
        once, since = (checkpointed, "first checkpoint") if tenth >= KILLS // 2 else (lambda: True, "start")
        for late in range(10):
            if (made := place.store.find(expected.identity)) is not None:
                assert made.files_digest == expected.files_digest
                if "resumed from" not in ran.told:
                    seconds = min(seconds, made.lineage.cost.wall_seconds)
                place.store.remove(expected.identity)
                ends += 1
            moment = fraction * seconds * 0.8**late
            ran = place.start(*command)
            code = ran.kill_after(name, moment, once)
            resumed += "resumed from" in ran.told
            if code == -signal.SIGKILL and place.store.find(expected.identity) is None:
                break
            assert code in (0, -signal.SIGKILL), ran.told
        else:
            pytest.fail(f"{name} was always finished before it was killed:\n{ran.told}")
        assert ran.started == [name]
        assert_whole(place)
        kept.append([part.name for part in place.store.parts(expected.identity)])
        logger.info("%s: killed %.2f s after its %s, %.2f s in all, with %s", name, moment, since, seconds, kept[-1])
    resumed += "resumed from" in place.run(*command).told
    assert [] in kept and any(kept) and resumed, "some before the first checkpoint and some after it"
    after = place.manifests()
    assert after[name].files_digest == expected.files_digest
    assert after[name].content == expected.content
    assert others(after) == others(before)
    logger.info("%s: %d kills, %d of the runs between came to their end, seed %d", name, KILLS, ends, SEED)


def others(manifests: dict[str, Manifest]) -> dict[str, Manifest]:
    """Those that no test here takes away, as they were made: a manifest says when."""
    return {name: manifest for name, manifest in manifests.items() if name not in PHASES}


def copy_store(source: str, target: str) -> None:
    """Copy every object of a store."""
    here, there = (open_storage(address, StoreSettings()) for address in (source, target))
    for found in here.objects(""):
        there.put(found.key, here.read(found.key))
