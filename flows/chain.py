"""The whole chain as one flow."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from prefect import Flow
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from pydantic import Field

from flows.gates import go_through_gates
from flows.patience import tried_again
from flows.preemption import requeued_when_preempted
from flows.preparation import Prepared, as_recipe, prepare
from flows.report import leave_report
from flows.results import result_storage
from flows.routing import check_pools, sections_elsewhere
from flows.run_names import recipe_run_name
from flows.tasks import Json, run_stage, stage_progress
from flows.texts import chain_page
from infra.store import ArtifactStore
from schemas.errors import GateNotMet
from schemas.manifest import Manifest
from schemas.recipe import Recipe
from stages.gates import check_passes

R = TypeVar("R")
RecipeText = Annotated[str, Field(title="file or YAML")]
"""Named so in forms, which offer it beside the fields of `Recipe`."""
RECIPE = "The recipe, field by field; or its file's path on the machine that runs the flow, or its text (YAML)."
STORE = "Address of the artifact store, file:///folder or s3://bucket/prefix. None: DISTILL_STORE_ADDRESS."
DEVICE = "Where networks run: cpu, cuda, cuda:0 or mps. None: DISTILL_DEVICE of the machine that runs the flow, or cpu."


def link_report(recipe: Recipe, manifests: Mapping[str, Manifest], store: ArtifactStore) -> None:
    """Leave the report of what has been evaluated on the store, with what it took and how to make it again, and a link to it on the run's page."""
    address = leave_report(recipe, manifests, store)
    if address is not None:
        description = f"{recipe.name}: figures, what every stage took, and the commands that make them again"
        create_link_artifact(address, "report.html", key="report", description=description)


_FIELDS = "\n\nArgs:\n"


def described(summary: str, **parameters: str) -> str:
    """Return a docstring in the form that Prefect shows: the summary on the flow's page, a sentence at each field of its form."""
    return f"{summary}{_FIELDS}" + "\n".join(f"    {name}: {sentence}" for name, sentence in parameters.items())


def make_flow(body: Callable[..., R], name: str, run_name: Callable[[], str]) -> Flow[..., R]:
    """Make the flow `name`. Its module must hold it as that name with underscores: a process that Prefect starts imports it from there."""
    body.__name__ = name.replace("-", "_")
    patient = tried_again(body)

    @functools.wraps(body)
    def whole(*arguments: Any, **named: Any) -> R:
        with requeued_when_preempted():
            return patient(*arguments, **named)

    # the fields' sentences stand in the form; on the flow's page they would be one paragraph
    description, *_ = (body.__doc__ or "").split(_FIELDS)
    return Flow(whole, name=name, description=description, flow_run_name=run_name, result_serializer="json")


def _chain(
    recipe: Recipe | RecipeText,
    store: str | None = None,
    device: str | None = None,
    *,
    pass_gates: tuple[str, ...] = (),
    until: str | None = None,
) -> dict[str, str]:
    recipe = as_recipe(recipe)
    check_passes(pass_gates, recipe.gates)
    prepared = prepare(recipe, store, device, progress=stage_progress, until=until, elsewhere=sections_elsewhere(recipe))
    return {name: manifest.identity for name, manifest in run_chain(prepared, pass_gates).items()}


_chain.__doc__ = described(
    "Run a recipe from its table of URLs to the published student. Finished stages are found, an interrupted one goes on where it was. "
    "Returns the identity of every stage run's artifact by the run's name.",
    recipe=RECIPE,
    store=STORE,
    device=DEVICE,
    pass_gates="Names of the recipe's gates to go past although they are not met. Empty: the chain stops at each that is not.",
    until="Stage run to end with, such as encode: it and what it needs are run. None: the whole chain.",
)
distill_chain = make_flow(_chain, "distill-chain", recipe_run_name)


def run_chain(prepared: Prepared, passed: Sequence[str] = ()) -> dict[str, Manifest]:
    """Run every stage of the plan as a task of the current flow run, in order; return the manifests by name.

    Stages whose recipe names another work pool run there, as their own deployment. Raises `BadInput` before any work where they cannot, and
    `GateNotMet`, with the page of what there is, after a stage with a gate that is neither met nor among `passed`.
    """
    plan, surroundings = prepared.plan, prepared.surroundings
    elsewhere = sections_elsewhere(plan.recipe)
    check_pools(plan, prepared.unfinished, elsewhere)
    storage = result_storage(surroundings.store)
    manifests: dict[str, Manifest] = {}
    results: dict[str, Json] = {}
    try:
        for node in plan.nodes:
            manifests[node.name], results[node.name] = run_stage(
                plan, node, surroundings, results, storage, elsewhere=node.section in elsewhere
            )
            go_through_gates(plan, node, manifests[node.name], surroundings.store, passed)
    except GateNotMet:
        _show(prepared, manifests)
        raise
    _show(prepared, manifests)
    return manifests


def _show(prepared: Prepared, manifests: Mapping[str, Manifest]) -> None:
    name, made = prepared.plan.recipe.name, [node.name for node in prepared.unfinished]
    create_markdown_artifact(chain_page(name, manifests, made, prepared.surroundings.store), key="chain", description=name)
    link_report(prepared.plan.recipe, manifests, prepared.surroundings.store)
