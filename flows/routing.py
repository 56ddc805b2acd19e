"""Stages on other machines: the run of a stage's own deployment on a work pool, joined where one is under way, cancelled with its chain.

Only artifact references pass: the worker is told the recipe and the identities of the inputs, and what it made is read from the store.
"""

import logging
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, State, WorkerStatus
from prefect.context import FlowRunContext
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from infra.outside import HubModel
from infra.store import ArtifactStore
from schemas.errors import BadInput, RunFailed, Transient
from schemas.evaluation import PublishConfig
from schemas.manifest import Manifest
from schemas.recipe import Recipe
from stages.plan import Node, Plan
from stages.runner import find_complete

logger = logging.getLogger(__name__)

POLL_SECONDS: Final = 0.5
WITH_CHAIN: Final = "cancelled with the chain that asked for it"


def sections_elsewhere(recipe: Recipe) -> frozenset[str]:
    """Return the sections whose stages the current flow run sends to other pools: those with a pool, but the one it runs on itself.

    A stage of its own pool runs in its own process: were it to wait there for a place, chains could fill the pool and wait for ever.
    """
    context = FlowRunContext.get()
    own = context.flow_run.work_pool_name if context is not None and context.flow_run is not None else None
    return frozenset(section for section, pool in recipe.pools.items() if pool != own)


def check_pools(plan: Plan, nodes: Sequence[Node], elsewhere: Collection[str]) -> None:
    """Look, before any work, whether each of `nodes` that runs elsewhere has a deployment there and finds what it reads outside the store.

    Raises one `BadInput` that names everything found wrong. That no worker is there yet is no mistake, and said in the log.
    """
    wrong: list[str] = []
    sent = [node for node in nodes if node.section in elsewhere]
    pools = plan.recipe.pools
    with get_client(sync_client=True) as client:
        for section, stage in dict.fromkeys((node.section, node.stage) for node in sent):
            name = deployment_name(stage, pools[section])
            try:
                client.read_deployment_by_name(name)
            except ObjectNotFound:
                wrong.append(
                    f"pools.{section}: found {pools[section]!r}; the Prefect server has no deployment {name}: "
                    f"expected a pool made by distill deploy --pool {pools[section]}"
                )
        if not wrong:
            _tell_of_missing_workers(client, {pools[node.section] for node in sent})
    wrong += [mistake for node in sent for mistake in relative_places(node, pools[node.section])]
    if wrong:
        raise BadInput("\n".join(dict.fromkeys(wrong)))


def relative_places(node: Node, pool: str) -> list[str]:
    """Say of each path of a stage that is another place on another machine what was expected of it."""
    return [
        f"{node.section}.{name}: found {address!r}; the stage runs on the pool {pool}: expected an absolute path, or an address"
        for name, address in _places(node).items()
        if "://" not in address and not Path(address).is_absolute() and HubModel.parse(address) is None
    ]


def _places(node: Node) -> dict[str, str]:
    """Addresses outside the store that the stage reads or writes, by field."""
    destination = node.config.destination if isinstance(node.config, PublishConfig) else None
    return dict(node.outside) | ({} if destination is None else {"destination": destination})


def deployment_name(stage: str, pool: str) -> str:
    """Return the full name of a stage's deployment on a pool, as `distill deploy` makes it."""
    return f"distill-{stage}/{pool}"


def run_on_pool(plan: Plan, node: Node, store: ArtifactStore) -> Manifest:
    """Return the node's artifact, made by a worker of the pool that the recipe names for its section.

    A run of the same artifact that is under way, started by this chain before it was interrupted or by another one, is joined. Raises `Transient`
    when the worker was lost or the server cannot be reached, and `RunFailed` when the run failed or somebody cancelled it. When the chain is
    cancelled, so is the run; a chain that is only interrupted leaves it going on.
    """
    try:
        with get_client(sync_client=True) as client:
            while True:
                run = _join_or_start(client, plan, node, store)
                state = _wait(client, run, node)
                found = find_complete(store, plan.identities[node.name])
                if found is not None:
                    return found
                if not _was_cancelled_with_another_chain(client, run.id, state):
                    raise _failure(node, run, state)
                logger.info("%s: run %s was cancelled with another chain; it is started anew", node.name, run.name)
    except httpx.HTTPError as error:
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
            raise RunFailed(
                f"{node.name}: Prefect's server refuses its run on the pool {plan.recipe.pools[node.section]} ({error})"
            ) from error
        raise Transient(f"{node.name}: Prefect's server cannot be reached ({error})") from error


def _join_or_start(client: SyncPrefectClient, plan: Plan, node: Node, store: ArtifactStore) -> FlowRun:
    """Return the run that is under way for the artifact, or a new one.

    Two chains that both find none have counted the same earlier runs: their keys are equal, and the server makes one run of both.
    """
    identity = plan.identities[node.name]
    tag = f"artifact-{identity[:16]}"
    runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[tag])))
    for run in runs:
        if run.state is not None and not run.state.is_final():
            logger.info("%s: joins run %s, which makes the same artifact", node.name, run.name)
            return run
    started = run_deployment(
        deployment_name(node.stage, plan.recipe.pools[node.section]),
        parameters={
            "recipe": plan.recipe.model_dump(mode="json") | {"gates": {}},  # the chain looks at them itself
            "store": store.address,
            "inputs": {name: plan.identities[name] for name in node.upstream()},
            "run": node.name,
            "identity": identity,
        },
        tags=[tag],
        idempotency_key=f"{identity}-{len(runs)}",
        timeout=0,
    )
    assert isinstance(started, FlowRun), "a coroutine only where one is awaited"
    return started


def _wait(client: SyncPrefectClient, run: FlowRun, node: Node) -> State:
    logger.info("%s: waits for run %s on a worker of %s", node.name, run.name, run.work_pool_name)
    try:
        while True:
            state = client.read_flow_run(run.id).state
            if state is not None and state.is_final():
                return state
            time.sleep(POLL_SECONDS)
    except BaseException:  # a termination signal, raised in this thread; the worker must hear of it only where a person cancelled the chain
        if _chain_is_cancelled(client):
            client.set_flow_run_state(run.id, Cancelling(message=WITH_CHAIN))
            logger.info("%s: run %s is cancelled with this chain", node.name, run.name)
        else:
            logger.warning("%s: run %s goes on; to stop it: prefect flow-run cancel %s", node.name, run.name, run.id)
        raise


def _chain_is_cancelled(client: SyncPrefectClient) -> bool:
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return False
    state = client.read_flow_run(context.flow_run.id).state
    return state is not None and (state.is_cancelling() or state.is_cancelled())


def _was_cancelled_with_another_chain(client: SyncPrefectClient, run_id: UUID, state: State) -> bool:
    return state.is_cancelled() and any(earlier.message == WITH_CHAIN for earlier in client.read_flow_run_states(run_id))


def _failure(node: Node, run: FlowRun, state: State) -> RunFailed | Transient:
    what = f"{node.name}: its run {run.name} on the pool {run.work_pool_name} ended as {state.name}: {state.message or 'without a message'}"
    if state.is_crashed():
        return Transient(what)
    if state.is_completed():
        return RunFailed(f"{what}; its artifact is not on this chain's store: expected workers that reach the same one")
    return RunFailed(what)


def _tell_of_missing_workers(client: SyncPrefectClient, pools: Collection[str]) -> None:
    for pool in sorted(pools):
        if not any(worker.status == WorkerStatus.ONLINE for worker in client.read_workers_for_work_pool(pool)):
            logger.warning("pool %s: no worker is there; its stages wait until one is started with: distill worker %s", pool, pool)
