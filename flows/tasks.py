"""One stage run as one Prefect task: named after it, cached under its artifact's identity, a hit verified against the store."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
from prefect import Task
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.exceptions import PrefectException
from prefect.filesystems import WritableFileSystem
from pydantic import ValidationError

from flows.notifications import alarms_are_events
from flows.patience import may_pass, tried_by_task
from flows.progress import PrefectProgress
from flows.routing import run_on_pool
from flows.texts import failure_page, manifest_page
from infra.progress import Progress, local_progress
from infra.store import ArtifactStore
from schemas.errors import DistillError
from schemas.manifest import Manifest
from schemas.share import Share
from stages.plan import Node, Plan
from stages.runner import Surroundings, execute, execute_share, find_complete

logger = logging.getLogger(__name__)

RETRY_DELAYS_SECONDS = (10.0, 60.0, 300.0)
"""Waits before the further tries of a stage that met a failure which may pass. The store has retried by itself before."""

Json = dict[str, Any]


def failure_may_pass(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Retry only what may pass by itself: never a bad recipe, a NaN or a bug."""
    return may_pass(state.result(raise_on_failure=False))


RETRIED: Final[Json] = {
    "retries": len(RETRY_DELAYS_SECONDS),
    "retry_delay_seconds": list(RETRY_DELAYS_SECONDS),
    "retry_jitter_factor": 0.2,
    "retry_condition_fn": failure_may_pass,
}
"""Of a task."""


def title(node: Node) -> str:
    """Return a node's name for people: `lightning-8-4` is `lightning 8→4`, and its phase `lightning-8-4-lora` is `lightning 8→4 lora`."""
    rest = node.name.removeprefix(node.stage).strip("-")
    return f"{node.stage} {re.sub(r'(?<=[0-9])-(?=[0-9])', '→', rest).replace('-', ' ')}".strip()


@contextmanager
def stage_progress(node: Node) -> Iterator[Progress]:
    """Progress on the terminal and on the task run's page; alarms of a training as events."""
    with alarms_are_events(), local_progress(title(node)) as local:
        yield PrefectProgress(title(node), local)


def identity_key(_context: TaskRunContext, parameters: Mapping[str, Any]) -> str:
    """Cache key and storage key of the result. Stage, revision, configuration, seed and inputs are in the identity; the run is not."""
    return str(parameters["identity"])


def run_stage(
    plan: Plan,
    node: Node,
    surroundings: Surroundings,
    upstream: Mapping[str, Json],
    storage: Path | WritableFileSystem,
    *,
    elsewhere: bool = False,
) -> tuple[Manifest, Json]:
    """Run or find one stage as a task. Returns its manifest, and the task's own result, which links later tasks to it on the run's page.

    `elsewhere`: on a worker of the pool that the recipe names for it; the task waits.

    Called directly and never submitted: the body runs in the main thread, where SIGTERM reaches it and a checkpoint is saved in the grace period.
    """
    identity = plan.identities[node.name]

    @tried_by_task()
    def make(identity: str, inputs: dict[str, Json]) -> Json:
        if elsewhere and find_complete(surroundings.store, identity) is None:
            manifest = run_on_pool(plan, node, surroundings.store)
        else:
            manifest = execute(plan, node, surroundings, {name: Manifest.model_validate(value) for name, value in inputs.items()})
        create_markdown_artifact(manifest_page(manifest, surroundings.store), key=node.name, description=f"{node.stage} {identity[:12]}")
        return manifest.model_dump(mode="json")

    task = Task(
        make,
        name=node.stage,
        description=f"The stage {node.stage} of the recipe {plan.recipe.name}.",
        task_run_name=title(node),
        persist_result=True,
        result_storage=storage,
        result_serializer="json",
        cache_result_in_memory=False,
        cache_key_fn=identity_key,
        **RETRIED,
    )
    inputs = {name: upstream[name] for name in node.upstream() if name in upstream}  # others are found on the store
    found = find_complete(surroundings.store, identity)
    try:
        result = task.with_options(refresh_cache=found is None)(identity, inputs)
    except DistillError as error:
        _show_failure(plan, node, surroundings.store, error)
        raise
    manifest = _manifest(result, found)
    if manifest is None:
        logger.warning("%s: the result Prefect kept is not the artifact on the store; it is read anew", node.name)
        result = task.with_options(refresh_cache=True)(identity, inputs)
        manifest = Manifest.model_validate(result)
    surroundings.store.note_latest(plan.recipe.name, node.name, manifest.identity)  # also where the task was cached
    return manifest, result


def run_share(plan: Plan, node: Node, surroundings: Surroundings, share: Share) -> Json:
    """Have a share of a stage's shards kept, as a task. Returns what it was; what is made lies on the store."""

    @tried_by_task()
    def make() -> None:
        execute_share(plan, node, surroundings, share)

    task = Task(make, name=node.stage, task_run_name=f"{title(node)} {share}", persist_result=False, **RETRIED)
    try:
        task()
    except DistillError as error:
        _show_failure(plan, node, surroundings.store, error)
        raise
    return {"identity": plan.identities[node.name], "share": str(share)}


def _show_failure(plan: Plan, node: Node, store: ArtifactStore, error: DistillError) -> None:
    """Put the reason, and how to go on, on the run's page."""
    page = failure_page(plan.recipe.name, node.name, store, str(error))
    try:
        create_markdown_artifact(page, key=f"{node.name}-failure", description=f"why {node.name} failed")
    except (httpx.HTTPError, PrefectException) as unreachable:
        logger.warning("%s: the failure could not be reported to Prefect: %s", node.name, unreachable)


def _manifest(result: Any, found: Manifest | None) -> Manifest | None:
    """Return the manifest a task gave, None where it is none or another than the store has."""
    try:
        manifest = Manifest.model_validate(result)
    except ValidationError:
        return None
    return manifest if found is None or (manifest.identity, manifest.files_digest) == (found.identity, found.files_digest) else None
