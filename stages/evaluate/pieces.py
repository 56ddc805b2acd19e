"""Finished pieces of an evaluation: what a killed run has kept is taken over, what is new is kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.workspace import Workspace


class Pieces:
    """The parts of one run, listed once: a long evaluation has thousands."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._kept = {part.name: part for part in workspace.parts()}

    @contextmanager
    def piece(self, name: str) -> Iterator[tuple[Path, bool]]:
        """A folder with the piece's files, and whether they are there already; where not, the block makes them and they are kept at its end."""
        with self._workspace.folder(name) as folder:
            if name in self._kept:
                yield self._workspace.load_part(self._kept[name], folder), True
            else:
                yield folder, False
                self._workspace.save_part(name, folder)
