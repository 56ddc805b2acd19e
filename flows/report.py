"""The report of a chain that has ended: the evaluation's page, with what every stage took and how it was run.

Neither is part of the artifact: equal runs have equal bytes there, whatever they took and wherever they ran. Every run that has evaluated leaves the
page beside the artifact, on the store.
"""

from collections.abc import Mapping

import yaml

from infra.store import ArtifactStore
from schemas.errors import BadInput
from schemas.manifest import Evaluation, Manifest, PublishedModel
from schemas.recipe import Recipe
from stages.plan import Plan
from stages.reports.ancestry import ancestors, lineage_row
from stages.reports.chain import ChainRun, chain_part, replace_chain_part
from stages.runner import find_complete


def planned_report(plan: Plan, store: ArtifactStore) -> str:
    """The page of a recipe that has run. Raises `BadInput` where its evaluation is not on the store."""
    found = {node.name: find_complete(store, plan.identities[node.name]) for node in plan.nodes if node.stage in ("evaluate", "publish")}
    if found.get("evaluate") is None:
        has = "has not run" if "evaluate" in found else "is not in the recipe"
        raise BadInput(f"{plan.recipe.name}: its stage evaluate {has} on {store.address}; expected a recipe that distill run has finished")
    return chain_report(plan.recipe, {name: manifest for name, manifest in found.items() if manifest is not None}, store)


def chain_report(recipe: Recipe, manifests: Mapping[str, Manifest], store: ArtifactStore) -> str:
    """The page. `manifests` are of a chain, an evaluation among them."""
    ends = [manifest for kind in (Evaluation, PublishedModel) for manifest in manifests.values() if isinstance(manifest.content, kind)]
    evaluation = ends[0]
    made = ancestors(ends, store.find)
    run = ChainRun(
        file=f"{recipe.name}.yaml",
        recipe=yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True),
        revisions=tuple(dict.fromkeys(manifest.lineage.source_revision for manifest in made)),
        libraries=tuple(f"{name} {version}" for name, version in evaluation.lineage.libraries.items()),
        devices=tuple(dict.fromkeys(manifest.lineage.device for manifest in made if manifest.lineage.device)),
    )
    part = chain_part([lineage_row(manifest) for manifest in made], {manifest.identity: manifest.lineage.cost for manifest in made}, run)
    page = (store.fetch(evaluation, ["report.html"]) / "report.html").read_text(encoding="utf-8")
    return replace_chain_part(page, part)


def leave_report(recipe: Recipe, manifests: Mapping[str, Manifest], store: ArtifactStore) -> str | None:
    """Keep the page beside the evaluation among `manifests`, in the place of an earlier run's; its address. None where there is no evaluation."""
    for manifest in manifests.values():
        if isinstance(manifest.content, Evaluation):
            return store.keep_report(manifest, chain_report(recipe, manifests, store))
    return None
