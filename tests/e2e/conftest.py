"""The nano recipe on pictures served here, and one undisturbed run of it, for the session."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from infra.demo.server import serve
from tests.e2e.nano import ADVERSARIAL_NODES, CHAIN, Place, write_adversarial, write_inputs, write_recipe


@dataclass(frozen=True)
class Nano:
    """The recipe's file, its pictures being served, and a Prefect server."""

    recipe: Path
    adversarial: Path
    """The recipe with a chain of adversarial phases."""
    server: str

    def place(self, folder: Path) -> Place:
        """A place with a store in `folder`."""
        return Place(folder, self.recipe, self.server, f"file://{folder / 'store'}")

    def copied(self, place: Place, folder: Path) -> Place:
        """A place with a copy of the store of another, in a folder as well."""
        shutil.copytree(place.address.removeprefix("file://"), folder / "store")
        return replace(self.place(folder), recipe=place.recipe)


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Iterator[Nano]:
    folder = tmp_path_factory.mktemp("nano")
    with serve(write_inputs(folder)) as port:  # one port for the session: it stands in the table, and so in every identity
        recipe = write_recipe(folder, port)
        yield Nano(recipe, write_adversarial(recipe), prefect_server)


@pytest.fixture(scope="session")
def undisturbed(nano: Nano, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place where the recipe has run from start to end, by a process that shares nothing with others. Only to be read."""
    place = nano.place(tmp_path_factory.mktemp("undisturbed"))
    place.run("run", str(nano.recipe), fresh=True)
    return place


@pytest.fixture(scope="session")
def adversarial(nano: Nano, undisturbed: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place where the adversarial recipe has run to its end, on the data and the LCM-LoRA of the other. Only to be read."""
    place = replace(nano.copied(undisturbed, tmp_path_factory.mktemp("adversarial")), recipe=nano.adversarial)
    for manifest in list(place.store.manifests()):
        if manifest.lineage.node not in (*ADVERSARIAL_NODES[:5], "lcm"):
            place.store.remove(manifest.identity)
    assert place.run("run", str(nano.adversarial)).started == [*CHAIN, "evaluate", "publish"]
    return place
