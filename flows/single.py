"""A flow of its own for every single stage, so that each can be started, scheduled and retried alone, with a form of its own."""

from prefect import Flow
from prefect.artifacts import create_markdown_artifact

from flows.chain import DEVICE, RECIPE, STORE, described, make_flow
from flows.preparation import prepare
from flows.results import result_storage
from flows.run_names import stage_run_name
from flows.tasks import Json, run_stage, stage_progress
from flows.texts import manifest_page
from schemas.base import Sha256
from schemas.recipe import Recipe
from stages.registry import STAGES, Stage


def _flow_of(stage: Stage) -> Flow[..., Json]:
    def run_single(
        recipe: Recipe | str,
        store: str | None = None,
        device: str | None = None,
        inputs: dict[str, Sha256] | None = None,
        run: str | None = None,
    ) -> Json:
        prepared = prepare(recipe, store, device, progress=stage_progress, only=run or stage.name, inputs=inputs)
        plan, surroundings = prepared.plan, prepared.surroundings
        node = plan.node(run or stage.name)
        manifest, result = run_stage(plan, node, surroundings, {}, result_storage(surroundings.store))
        create_markdown_artifact(manifest_page(manifest, surroundings.store), key=f"{node.name}-result", description=node.stage)
        return result

    run_single.__doc__ = described(
        f"Run the stage {stage.name} of a recipe alone and return its artifact's manifest as JSON ({' or '.join(stage.makes)}).",
        recipe=RECIPE,
        store=STORE,
        device=DEVICE,
        inputs="Artifacts to read, by input or stage run (teacher, latents, lightning-8-4). Those not given are found by identity.",
        run="Which run, where the recipe has several of this stage, such as lightning-8-4.",
    )
    return make_flow(run_single, f"distill-{stage.name}", stage_run_name)


SINGLE_STAGES: dict[str, Flow[..., Json]] = {stage.name: _flow_of(stage) for stage in STAGES.values()}
"""By stage name."""
globals().update({flow.fn.__name__: flow for flow in SINGLE_STAGES.values()})
