"""What can be known to fail before anything runs: devices, disks, and each stage's own look at what it will read."""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from schemas.errors import BadInput
from stages.plan import Node, Plan
from stages.registry import stage
from stages.runner import Surroundings, find_complete

MIN_FREE_BYTES = 512 * 2**20
"""Free space below which no run is begun, on the scratch disk and on the store's."""


def unfinished(plan: Plan, surroundings: Surroundings) -> tuple[Node, ...]:
    """Return the stage runs whose artifact is not on the store, in order."""
    return tuple(node for node in plan.nodes if find_complete(surroundings.store, plan.identities[node.name]) is None)


def preflight(nodes: Iterable[Node], plan: Plan, surroundings: Surroundings) -> None:
    """Check what `nodes` of the plan need. Raises one `BadInput` that names everything found wrong."""
    nodes = tuple(nodes)
    wrong = list(_problems(nodes, plan, surroundings)) if nodes else []
    if wrong:
        raise BadInput("\n".join(wrong))


def _problems(nodes: tuple[Node, ...], plan: Plan, surroundings: Surroundings) -> Iterator[str]:
    checks: tuple[Callable[[], None], ...] = (partial(check_device, surroundings.device), surroundings.store.check_cache)
    for check in checks:
        try:
            check()
        except BadInput as error:
            yield str(error)
    yield from _short_disks(surroundings)
    for node in {(node.stage, tuple(node.outside.items())): node for node in nodes}.values():
        try:
            own = stage(node.stage).load_preflight()
            if own is not None:
                own(node.config, node.outside, plan.recipe)
        except BadInput as error:
            yield str(error)


def check_device(device: str) -> None:
    """Raise `BadInput` unless torch can use `device` here (`cpu`, `cuda`, `cuda:1`, `mps`)."""
    if device == "cpu":
        return
    import torch  # noqa: PLC0415 - seconds, and not needed for the CPU

    kind, _, index = device.partition(":")
    usable = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in usable or (index and not (index.isascii() and index.isdecimal())):
        raise BadInput(f"device {device!r}: expected cpu, cuda, cuda:0 or mps")
    if usable[kind] <= int(index or 0):
        raise BadInput(f"device {device!r}: this machine has {usable[kind] or 'no'} such device(s) that torch {torch.__version__} can use")


def _short_disks(surroundings: Surroundings) -> Iterator[str]:
    places = {"scratch": surroundings.scratch or Path(tempfile.gettempdir())}
    if surroundings.store.address.startswith("file://"):
        places["store"] = Path(surroundings.store.address.removeprefix("file://"))
    for name, path in places.items():
        try:
            free = shutil.disk_usage(path).free
        except OSError as error:
            yield f"{name} folder {path}: cannot be used ({error.strerror})"
            continue
        if free < MIN_FREE_BYTES:
            yield f"{name} folder {path}: {free / 2**20:.0f} MiB free on its disk, expected at least {MIN_FREE_BYTES / 2**20:.0f} MiB"
