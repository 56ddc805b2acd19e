"""A lease keeps a second run from doing the same work at the same time.

Lease objects are numbered generations, `leases/<identity>/<n>.json`, each created by a create-only put: of any number of takers of
generation n + 1 exactly one wins, on every backend, with no compare-and-swap. Only the holder of a generation writes it again, to renew
or release it; a holder that was taken over sees the higher generation and knows it lost. Should two runs work at once all the same (a
holder cut off from the store for longer than its lease), the conditional manifest still lets one win: a lease saves work, it guards no
result.

When is a holder dead? (1) It said so (released). (2) It ran on this host, under this boot and process namespace, and its process is gone:
known at once after kill -9. (3) By the store's own clock its last renewal is older than the lease: no clocks of hosts are compared.
(4) We watched it for the length of the lease by our own monotonic clock and saw no renewal.
"""

import contextlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from infra.store.filesystem import ObjectInfo, Storage
from schemas.base import Model, Sha256
from schemas.errors import DistillError

logger = logging.getLogger(__name__)

LEASES = "leases"
CLOCK_SECONDS = 1.0
"""Resolution of the time stamps of S3: an age can be this much off."""


class LeaseRecord(Model):
    """What a lease object says."""

    holder: str
    """`host:pid:uuid`."""
    host: str
    pid: int
    process_started: str | None
    """Start time of the process in the kernel's ticks: process ids are used again."""
    boot: str | None
    """Boot and process-id namespace of the host: a pid means nothing outside them."""
    seconds: float
    renewals: int = 0
    released: bool = False


@dataclass
class Lease:
    """A right to work on one identity, renewed in the background until the `with` block ends."""

    identity: Sha256
    already_done: bool = False
    """True when the artifact exists: there is nothing to do, and nothing is held."""
    generation: int = 0
    _lost: threading.Event = field(default_factory=threading.Event)

    @property
    def lost(self) -> bool:
        """True when another run took over because this one did not renew in time. Its result will still be adopted or refused whole."""
        return self._lost.is_set()


def _boot() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux: expiry alone decides
        return None


def _process_started(pid: int) -> str | None:
    """Start time of a living process, or None where it is gone or only waits to be reaped."""
    try:
        # After the command's name, which may hold anything but ends at the last parenthesis: state, ..., start time (field 22).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _new_record(seconds: float) -> LeaseRecord:
    host, pid = socket.gethostname(), os.getpid()
    return LeaseRecord(
        holder=f"{host}:{pid}:{uuid.uuid4().hex}", host=host, pid=pid, process_started=_process_started(pid), boot=_boot(), seconds=seconds
    )


def _process_is_gone(record: LeaseRecord) -> bool:
    if record.boot is None or record.boot != _boot() or record.host != socket.gethostname():
        return False
    return _process_started(record.pid) != record.process_started


def _key(identity: Sha256, generation: int) -> str:
    return f"{LEASES}/{identity}/{generation:08d}.json"


def _generation(info: ObjectInfo) -> int:
    return int(info.key.rpartition("/")[2].removesuffix(".json"))


def _latest(storage: Storage, identity: Sha256) -> tuple[ObjectInfo, LeaseRecord] | None:
    infos = sorted(storage.objects(f"{LEASES}/{identity}/"), key=_generation)
    while infos:
        info = infos.pop()
        try:
            return info, LeaseRecord.model_validate_json(storage.read(info.key))
        except FileNotFoundError:  # cleared away since the listing
            continue
    return None


def is_dead(record: LeaseRecord, info: ObjectInfo, now: float) -> bool:
    """Decide from the object alone, `now` being the store's time. A holder that cannot be judged yet counts as living."""
    return record.released or _process_is_gone(record) or now - info.modified > record.seconds + CLOCK_SECONDS


def has_live_lease(storage: Storage, identity: Sha256) -> bool:
    """True while somebody works on the identity."""
    try:
        latest = _latest(storage, identity)
    except ValidationError:  # written by another version: not ours to judge
        return True
    return latest is not None and not is_dead(latest[1], latest[0], storage.now())


class _Watch:
    """Remembers since when a lease object has not changed, by this process' monotonic clock."""

    def __init__(self) -> None:
        self._seen: tuple[str, LeaseRecord] | None = None
        self._since = 0.0

    def is_stuck(self, info: ObjectInfo, record: LeaseRecord) -> bool:
        if self._seen != (info.key, record):
            self._seen, self._since = (info.key, record), time.monotonic()
        return time.monotonic() - self._since > record.seconds


@contextlib.contextmanager
def hold(
    storage: Storage,
    identity: Sha256,
    *,
    done: Callable[[], bool],
    seconds: float,
    poll_seconds: float,
    on_wait: Callable[[str], None] | None,
) -> Iterator[Lease]:
    """Wait for the lease or for the artifact, whichever comes first, and hold the lease for the block.

    `on_wait` is called with the holder's name whenever waiting for a holder begins. Raises what the storage raises.
    """
    record = _new_record(seconds)
    generation = _acquire(storage, identity, record, done=done, poll_seconds=poll_seconds, on_wait=on_wait)
    if generation is None:
        yield Lease(identity, already_done=True)
        return
    lease, stop = Lease(identity, generation=generation), threading.Event()
    renewer = threading.Thread(target=_renew, args=(storage, lease, record, stop), name=f"lease-{identity[:12]}", daemon=True)
    try:
        if done():  # the holder before us finished between our look and our taking
            lease.already_done = True
        renewer.start()
        yield lease
    finally:
        stop.set()
        if renewer.ident is not None:
            renewer.join()
        _release(storage, lease, record, done)


def _acquire(
    storage: Storage,
    identity: Sha256,
    record: LeaseRecord,
    *,
    done: Callable[[], bool],
    poll_seconds: float,
    on_wait: Callable[[str], None] | None,
) -> int | None:
    """Return the generation we hold, or None when the artifact is there."""
    watch, waiting_for = _Watch(), ""
    while True:
        if done():
            return None
        latest = _latest(storage, identity)
        if latest is None or is_dead(latest[1], latest[0], storage.now()) or watch.is_stuck(*latest):
            generation = 1 if latest is None else _generation(latest[0]) + 1
            if storage.put_new(_key(identity, generation), record.model_dump_json().encode()):
                older, highest = _others(storage, identity, generation)
                if highest <= generation:  # else old generations were cleared while we looked away, and we made one that is long past
                    storage.delete(older)
                    if latest is not None and not latest[1].released:
                        logger.info("took over %s from %s, which is gone", identity[:12], latest[1].holder)
                    return generation
                storage.delete([_key(identity, generation)])
        elif waiting_for != latest[1].holder:
            waiting_for = latest[1].holder
            logger.info("waiting: %s is being made by %s", identity[:12], waiting_for)
            if on_wait is not None:
                on_wait(waiting_for)
        else:
            time.sleep(poll_seconds)


def _others(storage: Storage, identity: Sha256, generation: int) -> tuple[list[str], int]:
    """Return the keys of older generations, and the highest generation there is."""
    infos = list(storage.objects(f"{LEASES}/{identity}/"))
    return [info.key for info in infos if _generation(info) < generation], max((_generation(info) for info in infos), default=0)


def _renew(storage: Storage, lease: Lease, record: LeaseRecord, stop: threading.Event) -> None:
    renewals = 0
    while not stop.wait(record.seconds / 3):
        renewals += 1
        try:
            if _others(storage, lease.identity, lease.generation)[1] > lease.generation:
                logger.warning("the lease of %s was taken over by another run", lease.identity[:12])
                lease._lost.set()
                return
            renewed = record.model_copy(update={"renewals": renewals})
            storage.put(_key(lease.identity, lease.generation), renewed.model_dump_json().encode())
        except (DistillError, OSError) as error:  # the work goes on, and the next renewal may pass
            logger.warning("the lease of %s could not be renewed: %s", lease.identity[:12], error)


def _release(storage: Storage, lease: Lease, record: LeaseRecord, done: Callable[[], bool]) -> None:
    """Give the lease back. A failure is no harm: the lease expires, or this process ends."""
    if lease.lost:
        return
    key = _key(lease.identity, lease.generation)
    try:
        # Once the artifact is there, whoever takes generation 1 again finds it done. Before that the number must stay: the next is higher.
        if done():
            storage.delete([key])
        else:
            storage.put(key, record.model_copy(update={"released": True}).model_dump_json().encode())
    except (DistillError, OSError) as error:
        logger.warning("the lease of %s could not be released: %s", lease.identity[:12], error)
