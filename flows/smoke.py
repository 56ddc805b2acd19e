"""The tiny recipe from end to end, with every byte it made read again: for a nightly schedule and for CI."""

from flows.chain import DEVICE, STORE, RecipeText, described, make_flow, run_chain
from flows.demo import FOLDER, PROJECT
from flows.preparation import as_recipe, prepare
from flows.routing import sections_elsewhere
from flows.run_names import recipe_run_name
from flows.tasks import stage_progress
from infra.demo.server import serve
from infra.demo.table import make_collection
from schemas.errors import CorruptArtifact
from schemas.loading import load_recipe
from schemas.recipe import Recipe


def _smoke(recipe: Recipe | RecipeText | None = None, store: str | None = None, device: str | None = None) -> dict[str, str]:
    if recipe is not None:
        return _verified(recipe, store, device)
    collection = make_collection(FOLDER.absolute())
    with serve(collection.pictures, collection.port):
        return _verified(load_recipe(PROJECT / "recipes" / "tiny.yaml", [f"ingest.table={collection.table}"]), store, device)


def _verified(recipe: Recipe | str, store: str | None, device: str | None) -> dict[str, str]:
    recipe = as_recipe(recipe)
    prepared = prepare(recipe, store, device, progress=stage_progress, elsewhere=sections_elsewhere(recipe))
    manifests = run_chain(prepared)
    damaged = [f"{name}: {problem}" for name, manifest in manifests.items() for problem in prepared.surroundings.store.verify(manifest)]
    if damaged:
        raise CorruptArtifact("\n".join(damaged))
    return {name: manifest.identity for name, manifest in manifests.items()}


_smoke.__doc__ = described(
    "Run the chain on the tiny recipe and verify every file of every artifact; fails naming what is damaged.",
    recipe="The recipe, its file's path, or its text. None: the tiny recipe, on pictures that are drawn and served here.",
    store=STORE,
    device=DEVICE,
)
distill_smoke = make_flow(_smoke, "distill-smoke", recipe_run_name)
