"""Run a chain from this process: with the Prefect server that is configured, else with an embedded one for as long as it takes."""

from collections.abc import Mapping
from dataclasses import dataclass

from flows.environment import server_is_configured
from flows.preparation import prepare
from flows.server import EmbeddedServer
from infra.store import ArtifactStore
from schemas.errors import BadInput
from schemas.manifest import Manifest
from schemas.recipe import Recipe
from stages.gates import check_passes


@dataclass(frozen=True)
class Finished:
    """A chain that has run."""

    manifests: Mapping[str, Manifest]
    """By the name of the stage run, in order."""
    made: frozenset[str]
    """Names of the runs that were not there before."""
    store: ArtifactStore


def run_here(recipe: Recipe, store: str | None = None, device: str | None = None, pass_gates: tuple[str, ...] = ()) -> Finished:
    """Run a recipe as the flow `distill-chain`; what is finished is skipped, what was interrupted goes on, and gates named in `pass_gates` are
    passed although they are not met.

    The published folder is exported to `publish.destination` also where `publish` was found finished: a destination is no part of the result.
    """
    if recipe.pools and not server_is_configured():
        raise BadInput(
            f"pools: the recipe sends {', '.join(recipe.pools)} to work pools, and PREFECT_API_URL is not set; "
            "expected the address of a server, or --set pools={} to run all in this process"
        )
    check_passes(pass_gates, recipe.gates)
    # before Prefect: a mistake is told within seconds, without a failed run to look at
    prepared = prepare(recipe, store, device, elsewhere=recipe.pools)
    opened = prepared.surroundings.store
    identities = prepared.plan.identities
    if prepared.unfinished or recipe.gates or server_is_configured():  # else there is neither work nor anybody to show it to
        server = EmbeddedServer().start()
        from flows.chain import distill_chain  # noqa: PLC0415 - imports Prefect, which reads the server's address then

        server.wait()
        identities = distill_chain(recipe, opened.address, device, pass_gates=pass_gates)
    manifests = {name: manifest for name, identity in identities.items() if (manifest := opened.find(identity)) is not None}
    made = frozenset(node.name for node in prepared.unfinished)
    if recipe.publish is not None and recipe.publish.destination is not None and "publish" not in made:
        from stages.publish import export_folder  # noqa: PLC0415 - imports torch

        export_folder(opened.fetch(manifests["publish"]), recipe.publish.destination)
    return Finished(manifests, made, opened)
