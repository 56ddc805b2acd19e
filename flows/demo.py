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


def run_demo(folder: Path = FOLDER, overrides: tuple[str, ...] = ()) -> Shown:
    """Draw and serve pictures, and run recipes/tiny.yaml on them to a published student and a report, all below `folder`."""
    return _run("tiny.yaml", make_collection(folder.absolute()), folder.absolute(), overrides)


def train_tiny_teacher(folder: Path = FOLDER / "teacher", overrides: tuple[str, ...] = ()) -> Shown:
    """Train the tiny teacher from scratch by recipes/tiny-teacher.yaml. Takes an hour and more."""
    return _run("tiny-teacher.yaml", make_teacher_collection(folder.absolute()), folder.absolute(), overrides)


def _run(name: str, collection: Collection, folder: Path, overrides: tuple[str, ...]) -> Shown:
    path = PROJECT / "recipes" / name
    if not path.is_file():
        raise BadInput(f"{path}: missing; the demo runs from a checkout of the project")
    model = folder / "model"
    recipe = load_recipe(path, [f"ingest.table={collection.table}", f"publish.destination={model}", *overrides])
    with serve(collection.pictures, collection.port):
        finished = run_here(recipe, f"file://{folder / 'store'}")
    report = folder / "report.html"
    shutil.copyfile(finished.store.fetch(finished.manifests["evaluate"], ["report.html"]) / "report.html", report)
    return Shown(finished, report, model)
