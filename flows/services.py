"""A Prefect server, an object store and workers on this machine, without containers: what `distill services` starts, looks at and stops."""

import contextlib
import fcntl
import json
import logging
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from flows import environment
from flows.server import answers
from flows.supervision import STOP_SECONDS, Service, Supervisor
from infra.seaweedfs import PORTS, ObjectStore, free_ports, new_object_store, seaweedfs_command
from schemas.errors import BadInput, RunFailed

logger = logging.getLogger(__name__)

_COMMAND: Final = "from flows.cli import main; main()"


@dataclass(frozen=True)
class Ask:
    """What is to be started."""

    folder: Path
    """For data, logs, credentials, and the file `environment` that a shell can read."""
    port: int = 4200
    """Of Prefect's server and UI."""
    database: str | None = None
    """Address of a Postgres database for the server, such as postgresql+asyncpg://user:password@host/name. None: SQLite in the folder."""
    store: str | None = None
    """Address of a store that is there already. None: SeaweedFS is started."""
    pools: tuple[str, ...] = ("cpu=process", "gpu=process")
    """As `distill deploy --pool` takes them."""
    slots: int = 1
    """Runs at a time on each pool's worker."""
    lost_after: int = environment.SILENT_SECONDS
    """Seconds without a heartbeat after which a run is taken for lost."""

    @property
    def url(self) -> str:
        """Address of the server's API."""
        return f"http://127.0.0.1:{self.port}/api"


def run_services(ask: Ask, ready: Callable[[], None]) -> None:
    """Start everything, call `ready` once all is healthy, and until a signal ends this process start again what ends by itself.

    All are stopped then. Raises `BadInput` when services of that folder are up already, and `RunFailed` when one does not start or keeps ending.
    """
    forget_ended(ask.folder)
    with _held(ask.folder), Supervisor(ask.folder / "logs") as supervisor:
        _require_free(ask.port, "--port")
        reach, store = object_store_service(ask)
        if store is not None:
            supervisor.start(store)
        reach = {environment.API_URL: ask.url, **_authentication(), **reach}
        supervisor.start(server_service(ask))
        os.environ.update(reach)
        names = _deploy(ask)
        for name in names:
            supervisor.start(worker_service(name, ask, reach))
        _write_private(ask.folder / "environment", "".join(f"export {key}={shlex.quote(value)}\n" for key, value in reach.items()))
        _write_private(ask.folder / "state.json", json.dumps({"pid": os.getpid(), "environment": reach, "pools": names}))
        ready()
        while True:
            supervisor.keep_up()
            time.sleep(0.5)


def forget_ended(folder: Path) -> None:
    """Make the folder ready for services, forgetting earlier ones. Raises `BadInput` when some are up."""
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder):
        (folder / "state.json").unlink(missing_ok=True)


def is_up(folder: Path) -> bool:
    """Return whether all services of the folder have been started."""
    return (folder / "state.json").exists()


def health(folder: Path) -> dict[str, bool]:
    """Ask every service that is up in the folder whether it works, by name. Raises `BadInput` when none are."""
    state = _state(folder)
    reach = state["environment"]
    found = {"server": answers(f"{reach[environment.API_URL]}/health")}
    if "DISTILL_STORE_ENDPOINT_URL" in reach:
        found["store"] = _store_of(reach).answers()
    os.environ.update(reach)
    return found | {f"worker-{name}": found["server"] and _worker_is_online(name) for name in state["pools"]}


def stop_services(folder: Path) -> None:
    """Stop what is up in the folder, and wait until it is. Raises `BadInput` when nothing is up, `RunFailed` when it does not stop."""
    state = _state(folder)
    os.kill(state["pid"], signal.SIGTERM)
    end = time.monotonic() + (2 + len(state["pools"])) * STOP_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(BadInput), _held(folder):
            return
        time.sleep(0.2)
    raise RunFailed(f"{folder}: its services do not stop; see {folder / 'logs'}")


def _state(folder: Path) -> dict[str, Any]:
    try:
        with _held(folder):
            pass
    except BadInput:
        if is_up(folder):
            state: dict[str, Any] = json.loads((folder / "state.json").read_text())
            return state
        raise BadInput(f"{folder}: its services are still being started; expected to wait until they are up") from None
    except FileNotFoundError:
        pass
    raise BadInput(f"{folder}: no services are up; start them with: distill services up --folder {folder}")


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process that has it, however it ends. Raises `BadInput` when another has it."""
    with (folder / "lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{folder}: its services are up; stop them with: distill services down --folder {folder}") from None
        yield


def _authentication() -> dict[str, str]:
    """Return what a client of the server needs beside its address: nothing, unless this process was told to ask for it."""
    given = os.environ.get(environment.API_AUTHENTICATION)
    return {environment.API_AUTHENTICATION: given} if given else {}


def object_store_service(ask: Ask) -> tuple[dict[str, str], Service | None]:
    """Return what reaches the store, and the service where one is to be started; address and credentials stay from one time to the next."""
    if ask.store is not None:
        return {"DISTILL_STORE_ADDRESS": ask.store}, None
    known = ask.folder / "store" / "known.json"
    if known.exists():
        kept = json.loads(known.read_text())
        store, ports = ObjectStore(**kept["store"]), kept["ports"]
    else:
        ports = free_ports(PORTS)
        store = new_object_store(ports[0])
        known.parent.mkdir(parents=True, exist_ok=True)
        _write_private(known, json.dumps({"store": vars(store), "ports": ports}))
    for port in ports:
        _require_free(port, str(known))
    command = seaweedfs_command(known.parent, store, ports)
    reach = {"DISTILL_STORE_ADDRESS": f"s3://{store.bucket}/distill", **store.environment}
    return reach, Service("store", command, {}, store.answers)


def _store_of(reach: Mapping[str, str]) -> ObjectStore:
    bucket = reach["DISTILL_STORE_ADDRESS"].removeprefix("s3://").partition("/")[0]
    return ObjectStore(reach["DISTILL_STORE_ENDPOINT_URL"], bucket, reach["AWS_ACCESS_KEY_ID"], reach["AWS_SECRET_ACCESS_KEY"])


def _require_free(port: int, where: str) -> None:
    """Raise `BadInput` where something listens: what answered there would be taken for the service."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a port that was just closed is free
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            raise BadInput(f"{where}: port {port} is in use ({error.strerror}); expected a free one") from error


def server_service(ask: Ask) -> Service:
    """Return Prefect's server."""
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(ask.port)]
    # told to browsers: without it those of a server on another port ask the default one
    settings = {"PREFECT_HOME": str(ask.folder / "prefect"), "PREFECT_UI_API_URL": os.environ.get("PREFECT_UI_API_URL") or ask.url}
    if ask.database is not None:
        settings["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = ask.database
    return Service("server", command, settings, lambda: answers(f"{ask.url}/health"))


def _deploy(ask: Ask) -> list[str]:
    from flows.deployments import deploy  # noqa: PLC0415 - imports Prefect, which reads the server's address then
    from flows.pools import Pool  # noqa: PLC0415

    pools = [Pool.parse(text) for text in ask.pools]
    deploy(pools, {}, ask.lost_after)
    return [pool.name for pool in pools]


def worker_service(pool: str, ask: Ask, reach: Mapping[str, str]) -> Service:
    """Return the worker of a pool; `reach` is the environment that leads to server and store."""
    command = [sys.executable, "-c", _COMMAND, "worker", pool, "--limit", str(ask.slots), "--name", f"{pool}-services"]
    return Service(f"worker-{pool}", command, reach, lambda: _worker_is_online(pool))


def _worker_is_online(pool: str) -> bool:
    from prefect.client.orchestration import get_client  # noqa: PLC0415 - only once the server's address is set
    from prefect.client.schemas.objects import WorkerStatus  # noqa: PLC0415

    with contextlib.suppress(httpx.HTTPError), get_client(sync_client=True) as client:
        return any(worker.status == WorkerStatus.ONLINE for worker in client.read_workers_for_work_pool(pool))
    return False  # it cannot be known: the server is gone


def _write_private(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)
