"""A finished recipe again: nothing runs; one changed field runs its stage and what follows; one stage alone is made again the same."""

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import Nano
from tests.e2e.nano import NODES, Place, assert_whole

pytestmark = [pytest.mark.slow, pytest.mark.service]


@pytest.fixture
def finished(nano: Nano, undisturbed: Place, tmp_path: Path) -> Place:
    """A place where the recipe has run, to be changed."""
    shutil.copytree(Path(undisturbed.address.removeprefix("file://")), tmp_path / "store")
    return nano.place(tmp_path)


def planned(place: Place, *arguments: str) -> list[str]:
    """Names of the runs that `distill plan` says would run."""
    rows = json.loads(place.run("plan", *arguments, "--json").output.read_text())["stages"]
    assert [row["name"] for row in rows] == list(NODES)
    return [row["name"] for row in rows if not row["done"]]


def test_only_what_changed_runs_and_the_plan_says_so_before(nano: Nano, finished: Place) -> None:
    recipe, before = str(nano.recipe), finished.manifests()
    assert planned(finished, recipe) == []
    again = finished.run("run", recipe)
    assert again.started == []
    assert again.output.read_text().count(" found ") == len(NODES)

    fewer = ("--set", "evaluate.prompt_count=4")
    assert planned(finished, recipe, *fewer) == ["evaluate", "publish"]
    assert finished.run("run", recipe, *fewer).started == ["evaluate", "publish"]
    slower = (*fewer, "--set", "lightning.links.2.learning_rate=5e-5")
    assert planned(finished, recipe, *slower) == ["lightning-4-2", "evaluate", "publish"]
    assert finished.run("run", recipe, *slower).started == ["lightning-4-2", "evaluate", "publish"]

    made = {manifest.identity: manifest for manifest in finished.store.manifests()}
    assert len(made) == len(NODES) + 2 + 3
    assert all(made[manifest.identity] == manifest for manifest in before.values())
    assert_whole(finished)


def test_a_stage_alone_is_made_again_with_the_same_bytes(nano: Nano, finished: Place) -> None:
    lcm = finished.manifests()["lcm"]
    finished.store.remove(lcm.identity)
    assert planned(finished, str(nano.recipe)) == ["lcm"]
    assert finished.run("stage", "lcm", str(nano.recipe)).started == ["lcm"]
    again = finished.manifests()["lcm"]
    assert (again.identity, again.files_digest) == (lcm.identity, lcm.files_digest)
    assert again.lineage.finished_at != lcm.lineage.finished_at
    assert finished.run("run", str(nano.recipe)).started == []
