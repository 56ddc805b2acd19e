"""The nano recipe on pictures served here, and one undisturbed run of it, for the session."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.demo.server import serve
from tests.e2e.nano import Place, write_inputs, write_recipe


@dataclass(frozen=True)
class Nano:
    """The recipe's file, its pictures being served, and a Prefect server."""

    recipe: Path
    server: str

    def place(self, folder: Path) -> Place:
        """A place with a store in `folder`."""
        return Place(folder, self.recipe, self.server, f"file://{folder / 'store'}")


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Iterator[Nano]:
    folder = tmp_path_factory.mktemp("nano")
    with serve(write_inputs(folder)) as port:  # one port for the session: it stands in the table, and so in every identity
        yield Nano(write_recipe(folder, port), prefect_server)


@pytest.fixture(scope="session")
def undisturbed(nano: Nano, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place where the recipe has run from start to end. Only to be read."""
    place = nano.place(tmp_path_factory.mktemp("undisturbed"))
    place.run("run", str(nano.recipe))
    return place
