"""The tiny recipe from end to end, with every byte it made read again: for a nightly schedule and for CI."""

from pathlib import Path

from prefect import Flow

from flows.chain import DEVICE, RECIPE, STORE, described, run_chain
from flows.preparation import prepare
from flows.run_names import recipe_run_name
from flows.tasks import stage_progress
from schemas.errors import CorruptArtifact
from schemas.recipe import Recipe

TINY = str(Path(__file__).resolve().parent.parent / "recipes" / "tiny.yaml")


def _smoke(recipe: Recipe | str = TINY, store: str | None = None, device: str = "cpu") -> dict[str, str]:
    prepared = prepare(recipe, store, device, progress=stage_progress)
    manifests = run_chain(prepared)
    damaged = [f"{name}: {problem}" for name, manifest in manifests.items() for problem in prepared.surroundings.store.verify(manifest)]
    if damaged:
        raise CorruptArtifact("\n".join(damaged))
    return {name: manifest.identity for name, manifest in manifests.items()}


_smoke.__doc__ = described(
    "Run the chain on the tiny recipe and verify every file of every artifact; fails naming what is damaged.",
    recipe=RECIPE,
    store=STORE,
    device=DEVICE,
)
distill_smoke: Flow[..., dict[str, str]] = Flow(_smoke, name="distill-smoke", flow_run_name=recipe_run_name, result_serializer="json")
