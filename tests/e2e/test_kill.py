"""kill -9 in the middle of every stage in turn, then the same command: it ends, and every file is the undisturbed run's."""

import logging
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest

from schemas.manifest import Manifest
from tests.e2e.conftest import Nano
from tests.e2e.nano import NODES, Command, Place, assert_same, assert_whole

logger = logging.getLogger(__name__)
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
        try:
            assert command.wait_until(lambda: name in command.started), command.told  # noqa: B023 - called at once
            moment = Moment(place, command, expected[name], fraction, before)
            command.wait_until(moment.has_come)
        finally:
            command.kill()
        kept = [part.name for part in place.store.parts(expected[name].identity)]
        logger.info(
            "%s: killed after %.2f of %.2f s, with %s",
            name,
            time.monotonic() - moment.begun,
            expected[name].lineage.cost.wall_seconds,
            kept,
        )
        if place.store.find(expected[name].identity) is None:
            assert command.started[-1] == name
            return attempts
    pytest.fail(f"{name} was always finished before it was killed; the last run's log:\n{attempts[-1].told}")


@dataclass
class Moment:
    """When to kill a run that has just started: it is in the middle of its work."""

    place: Place
    command: Command
    expected: Manifest
    fraction: float
    before: set[str]
    """Names of the parts that were there before."""
    begun: float = field(default_factory=time.monotonic)

    def has_come(self) -> bool:
        """True when the fraction of the time is over, the downloader runs (`ingest`), and a new piece is kept."""
        name, identity = self.expected.lineage.node, self.expected.identity
        if name == "ingest" and not any("downloader.py" in line for line in self.command.processes().values()):
            return False
        if name in IN_PIECES and {part.name for part in self.place.store.parts(identity)} <= self.before:
            return self.place.store.find(identity) is not None  # too late: pieces go once the artifact is there
        return time.monotonic() - self.begun >= self.fraction * self.expected.lineage.cost.wall_seconds


def objects(place: Place) -> set[str]:
    """Everything on a store in a folder."""
    folder = Path(place.address.removeprefix("file://"))
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
