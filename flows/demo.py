"""`make demo` and `make teacher`: recipes on pictures that this machine draws, serves and fetches itself."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flows.local import Finished, run_here
from infra.demo.server import serve
from infra.demo.table import Collection, make_collection, make_teacher_collection
from schemas.errors import BadInput
from schemas.loading import load_recipe

PROJECT: Final = Path(__file__).resolve().parent.parent
FOLDER: Final = Path("demo")


@dataclass(frozen=True)
class Shown:
    """What a demo leaves behind."""

    finished: Finished
    report: Path
    """The HTML report, as a file on this machine."""
    model: Path
    """The published folder."""


def run_demo(folder: Path = FOLDER, overrides: tuple[str, ...] = (), recipe: str = "tiny.yaml") -> Shown:
    """Draw and serve pictures, and run one of the recipes made for them to a published student and a report, all below `folder`."""
    folder = folder.absolute()
    return _shown(recipe, make_collection(folder), folder, overrides)


def train_tiny_teacher(folder: Path = FOLDER / "teacher", overrides: tuple[str, ...] = ()) -> Shown:
    """Train the tiny teacher from scratch by recipes/tiny-teacher.yaml. Takes an hour and more."""
    folder = folder.absolute()
    return _shown("tiny-teacher.yaml", make_teacher_collection(folder), folder, overrides)


def run_on(collection: Collection, name: str, folder: Path, overrides: tuple[str, ...]) -> Finished:
    """Run the recipe of that file name on pictures served here. Raises `BadInput` outside a checkout of the project."""
    path = PROJECT / "recipes" / name
    if not path.is_file():
        raise BadInput(f"{path}: missing; the demo runs from a checkout of the project")
    recipe = load_recipe(path, [f"ingest.table={collection.table}", *overrides])
    with serve(collection.pictures, collection.port):
        return run_here(recipe, f"file://{folder / 'store'}")


def _shown(name: str, collection: Collection, folder: Path, overrides: tuple[str, ...]) -> Shown:
    model = folder / "model"
    finished = run_on(collection, name, folder, (f"publish.destination={model}", *overrides))
    report = folder / "report.html"
    shutil.copyfile(finished.store.fetch(finished.manifests["evaluate"], ["report.html"]) / "report.html", report)
    return Shown(finished, report, model)
