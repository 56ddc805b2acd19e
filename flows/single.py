"""A flow of its own for every single stage, so that each can be started, scheduled and retried alone, with a form of its own."""

from typing import Annotated

from prefect import Flow
from prefect.artifacts import create_markdown_artifact
from pydantic import StringConstraints

from flows.chain import DEVICE, RECIPE, STORE, RecipeText, described, link_report, make_flow
from flows.gates import go_through_gates
from flows.preparation import as_recipe, prepare
from flows.results import result_storage
from flows.run_names import stage_run_name
from flows.tasks import Json, run_share, run_stage, stage_progress
from flows.texts import manifest_page
from schemas.base import Sha256
from schemas.errors import BadInput
from schemas.recipe import Recipe
from schemas.share import Share, ShareText
from stages.gates import check_passes
from stages.registry import STAGES, Stage

InputReference = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{64}|latest:[a-z0-9][a-z0-9-]{0,62})$")]
"""An artifact's identity, or the newest of a recipe's stage run."""


def _flow_of(stage: Stage) -> Flow[..., Json]:
    def run_single(
        recipe: Recipe | RecipeText,
        store: str | None = None,
        device: str | None = None,
        *,
        inputs: dict[str, InputReference] | None = None,
        run: str | None = None,
        identity: Sha256 | None = None,
        share: ShareText | None = None,
        pass_gates: tuple[str, ...] = (),
    ) -> Json:
        recipe = as_recipe(recipe)
        check_passes(pass_gates, recipe.gates)
        prepared = prepare(recipe, store, device, progress=stage_progress, only=run or stage.name, inputs=inputs)
        plan, surroundings = prepared.plan, prepared.surroundings
        node = plan.node(run or stage.name)
        if identity not in (None, plan.identities[node.name]):
            raise BadInput(
                f"{node.name}: would make the artifact {plan.identities[node.name][:12]} here, expected {str(identity)[:12]}: "
                "this worker has another version of the code, or other files at the recipe's addresses"
            )
        if share is not None:
            return run_share(plan, node, surroundings, Share.parse(share))
        manifest, result = run_stage(plan, node, surroundings, {}, result_storage(surroundings.store))
        create_markdown_artifact(manifest_page(manifest, surroundings.store), key=f"{node.name}-result", description=node.stage)
        link_report(plan.recipe, {node.name: manifest}, surroundings.store)
        go_through_gates(plan, node, manifest, surroundings.store, pass_gates)
        return result

    run_single.__doc__ = described(
        f"Run the stage {stage.name} of a recipe alone and return its artifact's manifest as JSON ({' or '.join(stage.makes)}).",
        recipe=RECIPE,
        store=STORE,
        device=DEVICE,
        inputs="Artifacts to read, by input or stage run (teacher, latents, lightning-8-4). Identities, or latest:recipe.",
        run="Which run, where the recipe has several of this stage, such as lightning-8-4.",
        identity="The artifact that the run is to make, and is refused unless it would. None: whichever it makes. A chain fills it in.",
        share="Which of how many equal shares of its shards to make, such as 2/4, without the artifact; of pairs only. None: all, and the artifact.",
        pass_gates="Names of the recipe's gates to go past although they are not met. Empty: the run fails where one after this stage is not.",
    )
    return make_flow(run_single, f"distill-{stage.name}", stage_run_name)


SINGLE_STAGES: dict[str, Flow[..., Json]] = {stage.name: _flow_of(stage) for stage in STAGES.values()}
"""By stage name."""
globals().update({flow.fn.__name__: flow for flow in SINGLE_STAGES.values()})
