"""`make demo` and its longer siblings: recipes on pictures that this machine draws, serves and fetches itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from flows.local import Finished, run_here
from flows.report import chain_report
from infra.demo.server import serve
from infra.demo.table import Collection, make_collection, make_looks_collection, make_small_collection
from schemas.errors import BadInput
from schemas.loading import load_recipe
from schemas.recipe import Recipe

PROJECT: Final = Path(__file__).resolve().parent.parent
FOLDER: Final = Path("demo")


@dataclass(frozen=True)
class Demo:
    """A recipe's pictures, and the folder for them and for what is made of them."""

    draw: Callable[[Path], Collection]
    folder: Path


DEMOS: Final[Mapping[str, Demo]] = {
    "tiny.yaml": Demo(make_collection, FOLDER),
    "tiny-dmd.yaml": Demo(partial(make_small_collection, count=3000, seed=2), FOLDER / "dmd"),
    "tiny-adversarial.yaml": Demo(partial(make_small_collection, count=3000, seed=2), FOLDER / "adversarial"),
    "tiny-transfer.yaml": Demo(partial(make_looks_collection, count=2000, seed=3), FOLDER / "transfer"),
    "tiny-teacher.yaml": Demo(partial(make_small_collection, count=6000, seed=1), FOLDER / "teacher"),
}
"""By the recipe's file name."""


@dataclass(frozen=True)
class Shown:
    """What a demo leaves behind."""

    finished: Finished
    report: Path
    """The HTML report, as a file on this machine."""
    model: Path
    """The published folder."""


def run_demo(name: str = "tiny.yaml", folder: Path | None = None, overrides: tuple[str, ...] = ()) -> Shown:
    """Draw and serve pictures, and run the recipe that is made for them to a published student and a report, all below `folder`.

    Raises `BadInput` for a recipe that no pictures are drawn for.
    """
    folder = (folder or _demo(name).folder).absolute()
    model = folder / "model"
    recipe, finished = run_on_drawn(name, folder, (f"publish.destination={model}", *overrides))
    report = folder / "report.html"
    report.write_text(chain_report(recipe, finished.manifests, finished.store), encoding="utf-8")
    return Shown(finished, report, model)


def run_on_drawn(name: str, folder: Path, overrides: tuple[str, ...]) -> tuple[Recipe, Finished]:
    """Run the recipe of that file name on its pictures, drawn and served here; return it as it was run.

    Raises `BadInput` outside a checkout of the project.
    """
    path = PROJECT / "recipes" / name
    if not path.is_file():
        raise BadInput(f"{path}: missing; the demo runs from a checkout of the project")
    collection = _demo(name).draw(folder)
    recipe = load_recipe(path, [f"ingest.table={collection.table}", *overrides])
    with serve(collection.pictures, collection.port):
        return recipe, run_here(recipe, f"file://{folder / 'store'}")


def _demo(name: str) -> Demo:
    if name not in DEMOS:
        raise BadInput(f"{name}: no pictures are drawn for it; expected one of {', '.join(DEMOS)}")
    return DEMOS[name]
