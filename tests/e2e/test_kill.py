"""kill -9 in the middle of every stage in turn, then the same command: it ends, and every file is the undisturbed run's."""

import time
from datetime import timedelta
from pathlib import Path

import pytest

from schemas.manifest import Manifest
from tests.e2e.conftest import Nano
from tests.e2e.nano import NODES, Command, Place, assert_same, assert_whole

pytestmark = [pytest.mark.slow, pytest.mark.service]

FRACTIONS = (0.4, 0.2, 0.1, 0.05, 0.0)
"""Of a run's undisturbed duration: how long after its start it is killed, earlier each time it was too late."""
TRAINED = ("lightning-8-4", "lightning-4-2", "lcm")
IN_PIECES = ("encode", *TRAINED, "evaluate")
"""Runs that keep finished pieces: they are killed when a new one is there."""
TWICE = "lightning-8-4"


def test_killed_inside_every_stage_it_goes_on_and_ends_with_the_same_bytes(nano: Nano, undisturbed: Place, tmp_path: Path) -> None:
    expected = undisturbed.manifests()
    assert set(expected) == set(NODES)
    place = nano.place(tmp_path)
    resumed = ""
    for name in sorted((*NODES, TWICE), key=NODES.index):
        attempts = kill_inside(place, nano, expected, name)
        assert resumed in "".join(command.told for command in attempts)
        assert_whole(place)
        parts = place.store.parts(expected[name].identity)
        assert parts or name not in IN_PIECES
        for part in parts:  # verified as they are read
            place.store.load_part(expected[name].identity, part, tmp_path / "parts" / name / part.name)
        resumed = f"resumed from {parts[-1].name}" if name in TRAINED else ""
    last = place.run("run", str(nano.recipe))
    assert last.started == ["publish"]
    assert_same(place, expected)
    place.store.gc(dry_run=False, older_than=timedelta(0))
    assert_same(place, expected)
    assert objects(place) == objects(undisturbed), "something of the killed runs is left"


def kill_inside(place: Place, nano: Nano, expected: dict[str, Manifest], name: str) -> list[Command]:
    """Start the recipe and kill it inside the run `name`, as often as it takes to be in time; the commands this took."""
    attempts: list[Command] = []
    for fraction in FRACTIONS:
        for following in NODES[NODES.index(name) :]:  # made by an attempt that came too late
            if place.store.find(expected[following].identity) is not None:
                place.store.remove(expected[following].identity)
        before = {part.name for part in place.store.parts(expected[name].identity)}
        command = place.start("run", str(nano.recipe))
        attempts.append(command)
        assert command.wait_until(lambda: name in command.started), command.told  # noqa: B023 - called at once
        begun = time.monotonic()
        seconds = fraction * expected[name].lineage.cost.wall_seconds

        def is_inside() -> bool:
            if name == "ingest" and not any("downloader.py" in line for line in command.processes().values()):  # noqa: B023
                return False
            in_pieces = name in IN_PIECES and fraction == FRACTIONS[0]  # noqa: B023
            if in_pieces and {part.name for part in place.store.parts(expected[name].identity)} <= before:  # noqa: B023
                return place.store.find(expected[name].identity) is not None  # too late: the last piece goes when the artifact is there
            return time.monotonic() - begun >= seconds  # noqa: B023

        command.wait_until(is_inside)
        command.kill()
        if place.store.find(expected[name].identity) is None:
            assert command.started[-1] == name
            return attempts
    pytest.fail(f"{name} was always finished before it was killed; the last run's log:\n{attempts[-1].told}")


def objects(place: Place) -> set[str]:
    """Everything on a store in a folder."""
    folder = Path(place.address.removeprefix("file://"))
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
