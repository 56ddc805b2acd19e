"""Every flow as a deployment on work pools: the forms that the UI offers, and where a chain sends the stages whose recipe names a pool."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.deployments.runner import DeploymentApplyError, RunnerDeployment
from prefect.types.entrypoint import EntrypointType

from flows.chain import distill_chain
from flows.lost_runs import SILENT_SECONDS, TAG, watch_for_lost_runs
from flows.pools import PARENTS, Pool, create_pool
from flows.single import SINGLE_STAGES
from flows.smoke import distill_smoke
from infra.provenance import source_revision
from schemas.errors import BadInput, RunFailed

CHAINS: Final[tuple[Flow[..., Any], ...]] = (distill_chain, distill_smoke)
FLOWS: Final[tuple[Flow[..., Any], ...]] = (*CHAINS, *SINGLE_STAGES.values())


def make_deployment(flow: Flow[..., Any], name: str, pool: str | None = None) -> RunnerDeployment:
    """Return the deployment `name` of a flow; with a `pool`, for its workers. They must have this package installed."""
    return RunnerDeployment.from_flow(
        flow,
        name=name,
        work_pool_name=pool,
        description=flow.description,
        tags=_tags(flow, pool),
        version=source_revision(),
        # by module: a path would be relative to this folder, and the function found there is not the flow
        entrypoint_type=EntrypointType.MODULE_PATH,
    )


def deployments(pools: Sequence[str]) -> Iterator[RunnerDeployment]:
    """Yield every single stage's deployment on each of the pools, named after it; chains on the parents' pool alone, or the first."""
    parents = PARENTS if PARENTS in pools else pools[0]
    for flow in FLOWS:
        first, *others = [parents] if flow in CHAINS else pools
        made = make_deployment(flow, first, first)
        yield made
        for pool in others:  # the form, which takes a third of a second to describe, is the same
            yield made.model_copy(update={"name": pool, "work_pool_name": pool, "tags": _tags(flow, pool)})


def _tags(flow: Flow[..., Any], pool: str | None) -> list[str]:
    return ["distill", "chain" if flow in CHAINS else "stage", *([pool, TAG] if pool else [])]


def deploy(pools: Sequence[Pool], limits: Mapping[str, int], lost_after: int = SILENT_SECONDS) -> list[str]:
    """Make the pools, the deployments and the watch over their runs on the configured server; return the deployments' full names.

    `limits`: of a pool, the runs that all its workers together have at a time. `lost_after`: seconds without a heartbeat after which
    a run is taken for lost. Raises `BadInput`, and `RunFailed` when the server refuses.
    """
    names = [pool.name for pool in pools]
    unknown = sorted(set(limits) - set(names))
    if unknown:
        raise BadInput(f"--limit {unknown[0]}: is none of the pools {', '.join(names)}")
    with get_client(sync_client=True) as client:
        for pool in pools:
            create_pool(client, pool, limits.get(pool.name))
        watch_for_lost_runs(client, lost_after)
    made = list(deployments(names))
    for deployment in made:
        try:
            deployment.apply()
        except DeploymentApplyError as error:
            raise RunFailed(f"deployment {deployment.full_name}: {error}") from error
    return [deployment.full_name for deployment in made]


def parse_limits(items: Sequence[str]) -> dict[str, int]:
    """Read `NAME=COUNT` items. Raises `BadInput`."""
    limits: dict[str, int] = {}
    for item in items:
        name, _, count = item.partition("=")
        if not name or not (count.isascii() and count.isdecimal() and int(count) > 0):
            raise BadInput(f"--limit {item}: expected NAME=COUNT with a pool and a whole number of at least 1, such as gpu=2")
        limits[name] = int(count)
    return limits
