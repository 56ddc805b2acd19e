"""Every flow as a deployment on work pools: the forms that the UI offers, and where a chain sends the stages whose recipe names a pool."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.deployments.runner import DeploymentApplyError, RunnerDeployment
from prefect.schedules import Cron, Interval
from prefect.schedules import Schedule as PrefectSchedule
from prefect.types.entrypoint import EntrypointType

from flows.chain import distill_chain
from flows.environment import SILENT_SECONDS
from flows.lost_runs import TAG, watch_for_lost_runs
from flows.notifications import check_address, notify
from flows.pools import PARENTS, Pool, create_pool
from flows.routing import relative_places
from flows.single import SINGLE_STAGES
from flows.smoke import distill_smoke
from infra.provenance import source_revision
from schemas.errors import BadInput, RunFailed
from schemas.recipe import Recipe
from schemas.schedule import Schedule
from stages.gates import check_gates
from stages.plan import find_node, nodes_of

CHAINS: Final[tuple[Flow[..., Any], ...]] = (distill_chain, distill_smoke)
FLOWS: Final[tuple[Flow[..., Any], ...]] = (*CHAINS, *SINGLE_STAGES.values())


NIGHTLY: Final = Schedule(cron="0 3 * * *")
"""Of the smoke flow."""

_COLLISIONS: Final = {"skip": ConcurrencyLimitStrategy.CANCEL_NEW, "wait": ConcurrencyLimitStrategy.ENQUEUE}


def make_deployment(
    flow: Flow[..., Any],
    name: str,
    pool: str | None = None,
    *,
    schedule: Schedule | None = None,
    active: bool = True,
    parameters: dict[str, Any] | None = None,
) -> RunnerDeployment:
    """Return the deployment `name` of a flow; with a `pool`, for its workers. They must have this package installed.

    With a `schedule`, which may be there without being `active`, it has one run at a time.
    """
    return RunnerDeployment.from_flow(
        flow,
        name=name,
        work_pool_name=pool,
        description=flow.description,
        tags=_tags(flow, pool),
        version=source_revision(),
        # by module: a path would be relative to this folder, and the function found there is not the flow
        entrypoint_type=EntrypointType.MODULE_PATH,
        schedules=None if schedule is None else [_times(schedule, active=active)],
        concurrency_limit=None if schedule is None else ConcurrencyLimitConfig(limit=1, collision_strategy=_COLLISIONS[schedule.overlap]),
        parameters=parameters,
    )


def _times(schedule: Schedule, *, active: bool) -> PrefectSchedule:
    if schedule.cron is not None:
        return Cron(schedule.cron, timezone=schedule.timezone, active=active)
    assert schedule.every_hours is not None, "the schedule's own check"
    return Interval(timedelta(hours=schedule.every_hours), active=active)


def scheduled_chain(recipe: Recipe, pools: Sequence[str]) -> RunnerDeployment:
    """Return the deployment of a recipe's chain by its schedule, named after it. Raises `BadInput` for a recipe that cannot run by itself."""
    pool = _parents(pools)
    if recipe.schedule is None:
        raise BadInput(f"--schedule: the recipe {recipe.name} has none; expected a section such as schedule: {{cron: '0 2 * * *'}}")
    if recipe.name in pools:
        raise BadInput(
            f"--schedule: the recipe's name {recipe.name} is that of a pool, and so of a deployment of the chain; expected another"
        )
    nodes = nodes_of(recipe)
    check_gates(recipe.gates, nodes)
    until = recipe.schedule.until
    if until is not None:
        find_node(nodes, until)
    wrong = [mistake for node in nodes for mistake in relative_places(node, recipe.pools.get(node.section, pool))]
    if wrong:
        raise BadInput("\n".join(wrong))
    parameters = {"recipe": recipe.model_dump(mode="json"), "until": until}
    return make_deployment(distill_chain, recipe.name, pool, schedule=recipe.schedule, parameters=parameters)


def _parents(pools: Sequence[str]) -> str:
    return PARENTS if PARENTS in pools else pools[0]


def deployments(pools: Sequence[str], *, nightly: bool = False) -> Iterator[RunnerDeployment]:
    """Yield every single stage's deployment on each of the pools, named after it; chains on the parents' pool alone, or the first.

    The smoke flow's has a schedule, active where `nightly`.
    """
    for flow in FLOWS:
        first, *others = [_parents(pools)] if flow in CHAINS else pools
        made = make_deployment(flow, first, first, schedule=NIGHTLY if flow is distill_smoke else None, active=nightly)
        yield made
        for pool in others:  # the form, which takes a third of a second to describe, is the same
            yield made.model_copy(update={"name": pool, "work_pool_name": pool, "tags": _tags(flow, pool)})


def _tags(flow: Flow[..., Any], pool: str | None) -> list[str]:
    return ["distill", "chain" if flow in CHAINS else "stage", *([pool, TAG] if pool else [])]


def deploy(
    pools: Sequence[Pool],
    limits: Mapping[str, int],
    lost_after: int = SILENT_SECONDS,
    *,
    scheduled: Sequence[Recipe] = (),
    nightly: bool = False,
    notified: str | None = None,
) -> list[str]:
    """Make the pools, the deployments and the watch over their runs on the configured server; return the deployments' full names.

    `limits`: of a pool, the runs that all its workers together have at a time. `lost_after`: seconds without a heartbeat after which a run is
    taken for lost. `scheduled`: recipes whose chains run by their own schedules. `nightly`: whether the smoke flow runs by its. `notified`: an
    address that is told of failures and alarms. Raises `BadInput`, and `RunFailed` when the server refuses.
    """
    names = [pool.name for pool in pools]
    unknown = sorted(set(limits) - set(names))
    if unknown:
        raise BadInput(f"--limit {unknown[0]}: is none of the pools {', '.join(names)}")
    chains = [scheduled_chain(recipe, names) for recipe in scheduled]
    address = None if notified is None else check_address(notified)
    with get_client(sync_client=True) as client:
        for pool in pools:
            create_pool(client, pool, limits.get(pool.name))
        watch_for_lost_runs(client, lost_after)
        if address is not None:
            notify(client, address)
    made = [*deployments(names, nightly=nightly), *chains]
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
