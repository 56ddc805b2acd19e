"""Where `benchmarks.faults` tries its faults: services as `distill services up` starts them, a small chain, and what is killed of them."""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import yaml

from benchmarks.processes import descendants
from flows import environment
from flows.services import Ask, object_store_service, server_service, worker_service
from flows.supervision import Service, Supervisor
from infra.demo.server import serve
from infra.seaweedfs import free_ports
from schemas.manifest import Manifest

ROOT: Final = Path(__file__).resolve().parent.parent
ON_GPU: Final = ("encode", "lightning")
START_SECONDS: Final = 600.0


@dataclass(frozen=True)
class Fault:
    """What is killed, and when."""

    kind: str
    service: str
    moment: float
    """As a fraction of the undisturbed run's duration; for a rank, of the training's."""
    pause: float
    """Seconds until it is started again."""


@dataclass(frozen=True)
class Undisturbed:
    """The chain without a fault."""

    seconds: float
    artifacts: Mapping[str, Manifest]
    """By the name of the run that made each."""

    @property
    def training_seconds(self) -> float:
        """What training took."""
        return max(manifest.lineage.cost.wall_seconds for name, manifest in self.artifacts.items() if name.startswith("lightning"))


class Site:
    """Services that run, and a chain that is started on them."""

    def __init__(self, folder: Path, supervisor: Supervisor, started: Sequence[Service], data: Mapping[str, Any]) -> None:
        from prefect.client.orchestration import get_client  # noqa: PLC0415 - reads the server's address, which is set by now

        self.folder, self.supervisor, self.data = folder, supervisor, data
        self.services = {service.name: service for service in started}
        self.client = get_client(sync_client=True)

    def start(self, address: str) -> Any:
        """Start the chain by the API, as the UI does; the id of its run."""
        deployment = self.client.read_deployment_by_name("distill-chain/cpu")
        parameters = {"recipe": self.data, "store": address}
        return self.client.create_flow_run_from_deployment(deployment.id, parameters=parameters).id

    def wait(self, run: Any, seconds: float) -> str:
        """Wait for the run's end; the name of its state then, or of the last that was seen."""
        from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings  # noqa: PLC0415

        end, seen = time.monotonic() + seconds, "unknown"
        while time.monotonic() < end:
            # the server may be what was killed, and is asked again soon
            with contextlib.suppress(httpx.HTTPError), temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
                state = self.client.read_flow_run(run).state
                seen = seen if state is None else state.name
                if state is not None and state.is_final():
                    return seen
            time.sleep(0.5)
        return f"{seen} after {seconds:.0f} s"

    def ranks(self) -> list[int]:
        """Process ids of the processes that train."""
        return [pid for pid, line in descendants(self.supervisor.pid_of("worker-gpu")).items() if "spawn_main" in line]

    def strike(self, fault: Fault, undisturbed: Undisturbed, ended: threading.Event) -> None:
        """Kill at the fault's moment, and start again."""
        if fault.kind != "rank":
            ended.wait(fault.moment * undisturbed.seconds)
            self.supervisor.kill(fault.service)
            time.sleep(fault.pause)
            self.supervisor.start(self.services[fault.service], START_SECONDS)
            return
        while not (ranks := self.ranks()) and not ended.wait(0.3):
            pass
        ended.wait(fault.moment * undisturbed.training_seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(random.Random(fault.moment).choice(self.ranks() or ranks), signal.SIGKILL)


@contextmanager
def served_recipe(folder: Path) -> Iterator[dict[str, Any]]:
    """Write the chain's inputs, serve its pictures for the length of the block, and yield its recipe."""
    from tests.e2e.nano import write_inputs, write_recipe  # noqa: PLC0415 - makes a teacher, with all that takes to import

    with serve(write_inputs(folder)) as port:
        yield _recipe(write_recipe(folder, port))


def _recipe(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(path.read_text())
    for section in ("lcm", "evaluate", "publish"):
        del data[section]
    data["lightning"] |= {"chain": [8, 4], "world_size": 2, "training_steps": 40}
    return data | {"name": "faults", "pools": dict.fromkeys(ON_GPU, "gpu")}


@contextmanager
def services(folder: Path, data: Mapping[str, Any], lost_after: int) -> Iterator[Site]:
    """Start them, with this process' environment set to reach them, and the deployments that the chain needs."""
    for name in [name for name in os.environ if name.startswith(("PREFECT", "DISTILL", "AWS"))]:
        del os.environ[name]
    environment.prepare()
    ask = Ask(folder / "services", port=free_ports(1)[0], pools=("cpu", "gpu"), lost_after=lost_after)
    with Supervisor(folder / "logs") as supervisor:
        reach, store = object_store_service(ask)
        assert store is not None
        own = {"PREFECT_HOME": str(folder / "prefect"), "XDG_CACHE_HOME": str(folder / "cache")}
        os.environ |= {**reach, **own, environment.API_URL: ask.url, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        server = server_service(ask)
        workers = [worker_service(pool, ask, reach) for pool in ask.pools]
        for service in (store, server):
            supervisor.start(service, START_SECONDS)
        _deploy(lost_after)
        for service in workers:
            supervisor.start(service, START_SECONDS)
        yield Site(folder, supervisor, (store, server, *workers), data)


def _deploy(lost_after: int) -> None:
    from prefect.client.orchestration import get_client  # noqa: PLC0415

    from flows.chain import distill_chain  # noqa: PLC0415
    from flows.deployments import make_deployment  # noqa: PLC0415
    from flows.lost_runs import watch_for_lost_runs  # noqa: PLC0415
    from flows.pools import Pool, create_pool  # noqa: PLC0415
    from flows.single import SINGLE_STAGES  # noqa: PLC0415

    with get_client(sync_client=True) as client:
        for pool in ("cpu", "gpu"):
            create_pool(client, Pool(pool))
        watch_for_lost_runs(client, lost_after)
    make_deployment(distill_chain, "cpu", "cpu").apply()
    for stage in ON_GPU:
        make_deployment(SINGLE_STAGES[stage], "gpu", "gpu").apply()
