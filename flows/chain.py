"""The whole chain as one flow."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from prefect import Flow
from prefect.artifacts import create_link_artifact, create_markdown_artifact

from flows.preparation import Prepared, as_recipe, prepare
from flows.results import result_storage
from flows.routing import check_pools, sections_elsewhere
from flows.run_names import recipe_run_name
from flows.tasks import Json, run_stage, stage_progress
from flows.texts import chain_page
from infra.store import ArtifactStore
from schemas.manifest import Evaluation, Manifest
from schemas.recipe import Recipe

R = TypeVar("R")
RECIPE = "The recipe, or the path of a recipe file on the machine that runs the flow."
STORE = "Address of the artifact store, file:///folder or s3://bucket/prefix. Empty: DISTILL_STORE_ADDRESS."
DEVICE = "Where networks run: cpu, cuda, cuda:0 or mps. Empty: DISTILL_DEVICE of the machine that runs the flow, or cpu."


def link_report(manifests: Mapping[str, Manifest], store: ArtifactStore) -> None:
    """Put a link to the evaluation's report on the run's page."""
    for manifest in manifests.values():
        if isinstance(manifest.content, Evaluation):
            command = "`distill report RECIPE` writes it with the cost of every stage."
            create_link_artifact(store.file_address(manifest, "report.html"), "report.html", key="report", description=command)


def described(summary: str, **parameters: str) -> str:
    """Return a docstring in the form that Prefect shows: the summary on the flow's page, a sentence at each field of its form."""
    return f"{summary}\n\nArgs:\n" + "\n".join(f"    {name}: {sentence}" for name, sentence in parameters.items())


def make_flow(body: Callable[..., R], name: str, run_name: Callable[[], str]) -> Flow[..., R]:
    """Make the flow `name`. Its module must hold it as that name with underscores: a process that Prefect starts imports it from there."""
    body.__name__ = name.replace("-", "_")
    return Flow(body, name=name, flow_run_name=run_name, result_serializer="json")


def _chain(recipe: Recipe | str, store: str | None = None, device: str | None = None) -> dict[str, str]:
    recipe = as_recipe(recipe)
    prepared = prepare(recipe, store, device, progress=stage_progress, elsewhere=sections_elsewhere(recipe))
    return {name: manifest.identity for name, manifest in run_chain(prepared).items()}


_chain.__doc__ = described(
    "Run a recipe from its table of URLs to the published student. Finished stages are found, an interrupted one goes on where it was. "
    "Returns the identity of every stage run's artifact by the run's name.",
    recipe=RECIPE,
    store=STORE,
    device=DEVICE,
)
distill_chain = make_flow(_chain, "distill-chain", recipe_run_name)


def run_chain(prepared: Prepared) -> dict[str, Manifest]:
    """Run every stage of the plan as a task of the current flow run, in order; return the manifests by name.

    Stages whose recipe names another work pool run there, as their own deployment. Raises `BadInput` before any work where they cannot.
    """
    plan, surroundings = prepared.plan, prepared.surroundings
    elsewhere = sections_elsewhere(plan.recipe)
    check_pools(plan, prepared.unfinished, elsewhere)
    storage = result_storage(surroundings.store)
    manifests: dict[str, Manifest] = {}
    results: dict[str, Json] = {}
    for node in plan.nodes:
        manifests[node.name], results[node.name] = run_stage(
            plan, node, surroundings, results, storage, elsewhere=node.section in elsewhere
        )
    made = [node.name for node in prepared.unfinished]
    create_markdown_artifact(chain_page(plan.recipe.name, manifests, made, surroundings.store), key="chain", description=plan.recipe.name)
    link_report(manifests, surroundings.store)
    return manifests
