"""Run one node of a plan: find it finished, or take its lease, run the stage, publish. The only way a stage is run, with Prefect or without."""

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from infra.devices import exclusive, occupied_devices
from infra.progress import NullProgress, Progress
from infra.provenance import describe_host, library_versions, source_revision
from infra.store import ArtifactStore, Traffic
from infra.store.local import is_disk_full
from schemas.base import Model, digest
from schemas.errors import BadInput, DistillError, RunFailed, Transient
from schemas.manifest import Lineage, Manifest, Teacher
from schemas.share import Share
from schemas.training import TrainingConfig
from stages.meter import Meter
from stages.plan import Node, Plan
from stages.registry import stage
from stages.workspace import Workspace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Surroundings:
    """Where stages run: the same for every node of a run, and without influence on any result."""

    store: ArtifactStore
    device: str = "cpu"
    share_devices: bool = False
    """Whether training may use a device that another training of this machine is on; else it waits."""
    scratch: Path | None = None
    """Parent of the scratch folders. None: the system's temporary folder."""
    tensorboard: Path | None = None
    """Folder in which training tells its figures as it goes on. None: nowhere."""
    progress: Callable[[Node], AbstractContextManager[Progress]] = field(default=lambda _node: nullcontext(NullProgress()))


def execute(plan: Plan, node: Node, surroundings: Surroundings, inputs: Mapping[str, Manifest] | None = None) -> Manifest:
    """Return the node's artifact, made now or found.

    `inputs` are manifests of upstream nodes by node name; those not given are found on the store by identity. Raises `RunFailed` when an input does
    not exist, and whatever the stage raises. A process killed at any moment leaves a state from which the same call goes on.
    """
    manifest = _found_or_made(plan, node, surroundings, inputs or {})
    surroundings.store.note_latest(plan.recipe.name, node.name, manifest.identity)
    return manifest


def _found_or_made(plan: Plan, node: Node, surroundings: Surroundings, inputs: Mapping[str, Manifest]) -> Manifest:
    identity = plan.identities[node.name]
    store = surroundings.store
    found = find_complete(store, identity)
    if found is not None:
        logger.info("%s: found %s", node.name, identity[:12])
        return found
    known = _known(plan, node, store, inputs)
    with store.lease(identity) as lease:
        if lease.already_done:
            found = find_complete(store, identity)
            if found is not None:
                return found
        manifest = _run(plan, node, surroundings, known)
    store.delete_parts(identity)
    return manifest


def execute_share(plan: Plan, node: Node, surroundings: Surroundings, share: Share) -> None:
    """Keep a share of the node's shards on the store, where neither it nor the artifact is made yet; `execute` then makes the artifact of all.

    Shares are made side by side, each under a lease of its own. Raises `BadInput` for a stage that is not made in shares, and what `execute` raises.
    """
    identity, store = plan.identities[node.name], surroundings.store
    if not hasattr(node.config, "workers"):
        raise BadInput(f"{node.name}: found the share {share}; its work cannot be shared: expected a stage such as pairs, or no share")
    if share_is_made(store, identity, share):
        logger.info("%s: found share %s of %s", node.name, share, identity[:12])
        return
    known = _known(plan, node, store, {})
    with store.lease(digest([identity, str(share)])):
        if not share_is_made(store, identity, share):  # by the holder before us
            _run_share(plan, node, surroundings, known, share)


def share_is_made(store: ArtifactStore, identity: str, share: Share) -> bool:
    """Whether all of a share's shards are kept, or the artifact is made."""
    return any(part.name == share.part for part in store.parts(identity)) or find_complete(store, identity) is not None


def find_complete(store: ArtifactStore, identity: str) -> Manifest | None:
    """Return the artifact when its manifest and every object it lists are on the store, else None."""
    manifest = store.find(identity)
    if manifest is None:
        return None
    if store.is_complete(manifest):
        return manifest
    logger.warning("artifact %s: objects are missing on the store, or cut short: taken as not made", identity[:12])
    return None


def _known(plan: Plan, node: Node, store: ArtifactStore, inputs: Mapping[str, Manifest]) -> dict[str, Manifest]:
    return dict(inputs) | {name: inputs.get(name) or _required(store, plan, name, node) for name in node.upstream()}


def _required(store: ArtifactStore, plan: Plan, name: str, reader: Node) -> Manifest:
    manifest = find_complete(store, plan.identities[name])
    if manifest is None:
        identity = plan.identities[name]
        if not plan.input_digests[name]:  # given, so no stage of this recipe makes it
            raise RunFailed(
                f"{reader.name}: the artifact given for {name} ({identity[:12]}) is not whole on {store.address}; see distill verify {identity[:16]}"
            )
        raise RunFailed(
            f"{reader.name}: its input {name} ({plan.identities[name][:12]}) is not on {store.address}, or not whole; "
            f"run that stage first: distill stage {name}"
        )
    return manifest


def _run(plan: Plan, node: Node, surroundings: Surroundings, known: Mapping[str, Manifest]) -> Manifest:
    kind = stage(node.stage)
    run, inputs_class = kind.load()
    inputs = _inputs(inputs_class, node, known)
    processes = _processes(node, surroundings)
    with _working(plan, node, surroundings, known, processes) as workspace:
        manifest = run(node.config, inputs, workspace) if processes == 1 else _together(node, inputs, workspace, processes)
    if manifest.kind not in kind.makes:
        raise RunFailed(f"{node.name}: made a {manifest.kind}, expected {' or '.join(kind.makes)}")
    logger.info("%s: made %s in %.1f s", node.name, manifest.identity[:12], time.monotonic() - workspace.meter.started)
    return manifest


def _run_share(plan: Plan, node: Node, surroundings: Surroundings, known: Mapping[str, Manifest], share: Share) -> None:
    kind = stage(node.stage)
    inputs = _inputs(kind.load()[1], node, known)
    with _working(plan, node, surroundings, known, 1) as workspace:
        kind.load_share()(node.config, inputs, workspace, share)
        workspace.store.note_spent(workspace.identity, workspace.meter.cost())
        with workspace.folder("nothing") as folder:
            workspace.save_part(share.part, folder, {})
    logger.info("%s: made share %s in %.1f s", node.name, share, time.monotonic() - workspace.meter.started)


@contextmanager
def _working(plan: Plan, node: Node, surroundings: Surroundings, known: Mapping[str, Manifest], processes: int) -> Iterator[Workspace]:
    """The surroundings of one attempt at the node, on devices of its own where it trains. What it cost is noted where it fails."""
    trains = isinstance(node.config, TrainingConfig) and not surroundings.share_devices
    scratch = Path(tempfile.mkdtemp(prefix=f"distill-{node.name}-", dir=surroundings.scratch))
    try:
        with exclusive(occupied_devices(surroundings.device, processes) if trains else ()), surroundings.progress(node) as progress:
            traffic = Traffic(scratch / "traffic")
            meter = Meter.start(surroundings.device, _devices_wanted(node, processes), traffic)
            logger.info("%s: started %s", node.name, plan.identities[node.name][:12])
            workspace = Workspace(
                store=surroundings.store.metered(traffic),
                identity=plan.identities[node.name],
                lineage=_lineage(plan, node, surroundings, known),
                scratch=scratch,
                seed=node.seed,
                device=surroundings.device,
                outside=node.outside,
                progress=progress,
                tensorboard=surroundings.tensorboard,
                meter=meter,
            )
            try:
                yield workspace
            except BaseException as error:
                _note_spent(workspace, error)
                raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise RunFailed(f"{node.name}: disk full while working in {scratch} ({error}): free space, and run again") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        surroundings.store.release()  # else a chain run by one process would keep everything it ever fetched in the read cache


def _note_spent(workspace: Workspace, error: BaseException) -> None:
    """Remember what an attempt cost that ends without an artifact, where neither the store nor its input is what it ends for."""
    if isinstance(error, Transient | BadInput):
        return
    try:
        workspace.store.note_spent(workspace.identity, workspace.meter.cost())
    except (DistillError, OSError) as refused:
        logger.warning("%s: what this attempt cost is not kept: %s", workspace.lineage.node, refused)


def _devices_wanted(node: Node, processes: int) -> int:
    """Devices that the stage takes where there are as many: one a process."""
    return processes if isinstance(node.config, TrainingConfig) else int(getattr(node.config, "processes", 1))


def _processes(node: Node, surroundings: Surroundings) -> int:
    """Processes that run the stage together; only training asks for more than one, and only then is torch needed to tell."""
    if not isinstance(node.config, TrainingConfig):
        return 1
    from stages.elastic import processes_for  # noqa: PLC0415

    return processes_for(node.config, surroundings.device)


def _together(node: Node, inputs: Model, workspace: Workspace, processes: int) -> Manifest:
    from stages.elastic import Task, run_together  # noqa: PLC0415

    return run_together(Task(node.stage, node.config, inputs, workspace), processes)


def _inputs(inputs_class: type[Model], node: Node, known: Mapping[str, Manifest]) -> Model:
    fields: dict[str, object] = {}
    for name, source in node.inputs.items():
        fields[name] = known[source] if isinstance(source, str) else {upstream: known[upstream] for upstream in source}
    try:
        return inputs_class.model_validate(fields)
    except ValidationError as error:
        wrong = {".".join(str(part) for part in item["loc"] if part in fields or part in known) for item in error.errors()}
        kinds = ", ".join(f"{name} is {manifest.kind} {manifest.identity[:12]}" for name, manifest in known.items())
        raise BadInput(f"{node.name}: input {', '.join(sorted(wrong))} is of another kind than the stage reads ({kinds})") from error


def _lineage(plan: Plan, node: Node, surroundings: Surroundings, known: Mapping[str, Manifest]) -> Lineage:
    # of several teachers that which the stage works for: others are bases that it is measured on
    source = node.inputs.get("teacher")
    teacher = known[source].content if isinstance(source, str) else None
    return Lineage(
        stage=node.stage,
        node=node.name,
        revision=stage(node.stage).revision,
        config=node.config.model_dump(mode="json"),
        inputs=dict(plan.input_digests[node.name]),
        teacher_digest=teacher.weights_digest if isinstance(teacher, Teacher) else None,
        source_revision=source_revision(),
        libraries=library_versions(),
        host=describe_host(),
        device=surroundings.device,
    )
