"""A flow of its own for every single stage, so that each can be started, scheduled and retried alone, with a form of its own."""

from typing import Annotated

from prefect import Flow
from prefect.artifacts import create_markdown_artifact
from pydantic import Field

from flows.chain import DeviceParameter, RecipeParameter, StoreParameter
from flows.preparation import prepare
from flows.results import result_storage
from flows.run_names import stage_run_name
from flows.tasks import Json, run_stage, stage_progress
from flows.texts import manifest_page
from schemas.base import Sha256
from stages.registry import STAGES, Stage

InputsParameter = Annotated[
    dict[str, Sha256],
    Field(
        description="Artifacts to read, by input or stage run (teacher, latents, lightning-8-4, ...). Those not given are found by identity."
    ),
]


def _flow_of(stage: Stage) -> Flow[..., Json]:
    def run_single(
        recipe: RecipeParameter,
        store: StoreParameter = None,
        device: DeviceParameter = "cpu",
        inputs: InputsParameter = {},  # noqa: B006 - Prefect shows the default in the form and never writes to it
        run: Annotated[
            str | None, Field(description="Which run, where the recipe has several of this stage, such as lightning-8-4.")
        ] = None,
    ) -> Json:
        prepared = prepare(recipe, store, device, progress=stage_progress, only=run or stage.name, inputs=inputs)
        plan, surroundings = prepared.plan, prepared.surroundings
        node = plan.node(run or stage.name)
        manifest, result = run_stage(plan, node, surroundings, {}, result_storage(surroundings.store))
        create_markdown_artifact(manifest_page(manifest, surroundings.store), key=f"{node.name}-result", description=node.stage)
        return result

    run_single.__doc__ = (
        f"Run the stage {stage.name} of a recipe alone. Its inputs are found on the store by identity, or given.\n\n"
        f"{(stage.config.__doc__ or '').strip()} Makes: {' or '.join(stage.makes)}. Returns the artifact's manifest as JSON."
    )
    return Flow(run_single, name=f"distill-{stage.name}", flow_run_name=stage_run_name, result_serializer="json")


SINGLE_STAGES: dict[str, Flow[..., Json]] = {stage.name: _flow_of(stage) for stage in STAGES.values()}
"""By stage name."""
