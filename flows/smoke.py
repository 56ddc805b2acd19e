"""The tiny recipe from end to end, with every byte it made read again: for a nightly schedule and for CI."""

from pathlib import Path

from prefect import flow

from flows.chain import DeviceParameter, RecipeParameter, StoreParameter, run_chain
from flows.preparation import prepare
from flows.run_names import recipe_run_name
from flows.tasks import stage_progress
from schemas.errors import CorruptArtifact

TINY = str(Path(__file__).resolve().parent.parent / "recipes" / "tiny.yaml")


@flow(name="distill-smoke", flow_run_name=recipe_run_name, result_serializer="json")
def distill_smoke(recipe: RecipeParameter = TINY, store: StoreParameter = None, device: DeviceParameter = "cpu") -> dict[str, str]:
    """Run the chain on the tiny recipe and verify every file of every artifact. Raises `CorruptArtifact` naming what is damaged."""
    prepared = prepare(recipe, store, device, progress=stage_progress)
    manifests = run_chain(prepared)
    damaged = [f"{name}: {problem}" for name, manifest in manifests.items() for problem in prepared.surroundings.store.verify(manifest)]
    if damaged:
        raise CorruptArtifact("\n".join(damaged))
    return {name: manifest.identity for name, manifest in manifests.items()}
