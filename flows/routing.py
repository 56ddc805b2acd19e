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
from schemas.share import Share
from stages.plan import Node, Plan
from stages.runner import find_complete, share_is_made

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

    Where the stage's configuration has `workers`, so many runs first make a share of its shards each, and the last makes the artifact of them.

    A run of the same artifact that is under way, started by this chain before it was interrupted or by another one, is joined. Raises `Transient`
    when the worker was lost or the server cannot be reached, and `RunFailed` when a run failed or somebody cancelled it. When the chain is
    cancelled, so are its runs; a chain that is only interrupted leaves them going on.
    """
    workers = int(getattr(node.config, "workers", 1))
    try:
        with get_client(sync_client=True) as client:
            if workers > 1:
                _have_run(client, plan, node, store, Share.all(workers))
            _have_run(client, plan, node, store, (None,))
            found = find_complete(store, plan.identities[node.name])
            assert found is not None, "else there was a failure"
            return found
    except httpx.HTTPError as error:
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
            raise RunFailed(
                f"{node.name}: Prefect's server refuses its run on the pool {plan.recipe.pools[node.section]} ({error})"
            ) from error
        raise Transient(f"{node.name}: Prefect's server cannot be reached ({error})") from error


def _have_run(client: SyncPrefectClient, plan: Plan, node: Node, store: ArtifactStore, shares: Sequence[Share | None]) -> None:
    """Have shares of the node's artifact made, or (None) the whole: all at the same time, as far as there are workers."""
    identity = plan.identities[node.name]

    def is_made(share: Share | None) -> bool:
        return find_complete(store, identity) is not None if share is None else share_is_made(store, identity, share)

    left = [share for share in shares if not is_made(share)]
    while left:
        runs = {share: _join_or_start(client, plan, node, store, share) for share in left}
        ended = _wait(client, list(runs.values()), node)
        for share, run in runs.items():
            state = ended.get(run.id)
            if state is None or is_made(share):
                continue
            if not _was_cancelled_with_another_chain(client, run.id, state):
                raise _failure(node, run, state)
            logger.info("%s: run %s was cancelled with another chain; it is started anew", node.name, run.name)
        left = [share for share in left if not is_made(share)]


def _join_or_start(client: SyncPrefectClient, plan: Plan, node: Node, store: ArtifactStore, share: Share | None) -> FlowRun:
    """Return the run that is under way for the artifact, or the share of it, or a new one.

    Two chains that both find none have counted the same earlier runs: their keys are equal, and the server makes one run of both.
    """
    identity = plan.identities[node.name]
    made = identity[:16] if share is None else f"{identity[:16]}-{share.part}"
    tag = f"artifact-{made}"
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
        }
        | ({} if share is None else {"share": str(share)}),
        tags=[tag],
        idempotency_key=f"{identity}-{len(runs)}" if share is None else f"{identity}-{share.part}-{len(runs)}",
        timeout=0,
    )
    assert isinstance(started, FlowRun), "a coroutine only where one is awaited"
    return started


def _wait(client: SyncPrefectClient, runs: Sequence[FlowRun], node: Node) -> dict[UUID, State]:
    """Wait until all have ended, or one that is not completed; the states of those that have."""
    for run in runs:
        logger.info("%s: waits for run %s on a worker of %s", node.name, run.name, run.work_pool_name)
    ended: dict[UUID, State] = {}
    try:
        while True:
            for run in runs:
                state = client.read_flow_run(run.id).state if run.id not in ended else None
                if state is not None and state.is_final():
                    ended[run.id] = state
            if len(ended) == len(runs) or not all(state.is_completed() for state in ended.values()):
                return ended
            time.sleep(POLL_SECONDS)
    except BaseException:  # a termination signal, raised in this thread; the worker must hear of it only where a person cancelled the chain
        cancelled = _chain_is_cancelled(client)
        for run in runs:
            if run.id in ended:
                continue
            if cancelled:
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
