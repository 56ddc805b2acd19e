"""Long-running processes of this machine, started one after the other, watched, and stopped in the opposite order."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flows.server import die_with_parent
from schemas.errors import RunFailed

logger = logging.getLogger(__name__)

START_SECONDS: Final = 180.0
"""How long a service may take to answer. Prefect's server creates its database on first use."""
STOP_SECONDS: Final = 60.0
"""How long a service may take to end. A worker's runs save their checkpoints first."""
RESTARTS: Final = 5
"""How often a service that ended is started again within an hour."""
_TAIL = 2000


@dataclass(frozen=True)
class Service:
    """One process: how it is started, and how to tell that it works."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    """Beside this process' own."""
    is_healthy: Callable[[], bool]


class Supervisor:
    """Runs services, each with a log `<name>.log` in one folder and a session of its own: Ctrl-C reaches them only through `stop`.

    Use as a context manager; on Linux the services end with this process, however it ends.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: list[tuple[Service, subprocess.Popen[bytes]]] = []
        self._restarts: list[tuple[str, float]] = []

    def __enter__(self) -> "Supervisor":
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def start(self, service: Service, seconds: float = START_SECONDS) -> None:
        """Start a service and wait until it is healthy. Raises `RunFailed` with the end of its log when it ends or stays silent."""
        with self.log_of(service).open("ab") as log:
            process = subprocess.Popen(
                service.command,
                env=os.environ | dict(service.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._logs,
                start_new_session=True,
                preexec_fn=die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509 - no thread holds a lock here
            )
        self._running.append((service, process))
        end = time.monotonic() + seconds
        while not service.is_healthy():
            self._check(service, process)
            if time.monotonic() > end:
                raise RunFailed(f"{service.name}: did not answer within {seconds:g} s; {self._tail(service)}")
            time.sleep(0.2)
        logger.info("%s: up", service.name)

    def check(self) -> None:
        """Raise `RunFailed` with the end of its log when a service has ended."""
        for service, process in self._running:
            self._check(service, process)

    def keep_up(self) -> None:
        """Start again what has ended. Raises as `start` and, for one that keeps ending, as `check`."""
        for place, (service, process) in enumerate(self._running):
            if process.poll() is None:
                continue
            now = time.monotonic()
            self._restarts = [(name, moment) for name, moment in self._restarts if now - moment < 3600]
            if [name for name, _ in self._restarts].count(service.name) >= RESTARTS:
                self._check(service, process)
            logger.warning("%s: ended with exit code %d, and is started again", service.name, process.returncode)
            self._restarts.append((service.name, now))
            self.kill(service.name)
            self.start(service)
            self._running.insert(place, self._running.pop())  # stopped in the order it was
            return

    def kill(self, name: str) -> None:
        """End a service and what it started as a machine does that fails, by SIGKILL. It can be started again."""
        ((service, process),) = [entry for entry in self._running if entry[0].name == name]
        _signal(process, signal.SIGKILL)
        process.wait()
        self._running.remove((service, process))

    def pid_of(self, name: str) -> int:
        """Return the process id of a service that runs: that of its session and process group too."""
        return next(process.pid for service, process in self._running if service.name == name)

    def _check(self, service: Service, process: "subprocess.Popen[bytes]") -> None:
        code = process.poll()
        if code is not None:
            raise RunFailed(f"{service.name}: ended with exit code {code}; {self._tail(service)}")

    def stop(self) -> None:
        """Stop all, the last first: the runs of a worker hear of it too, and save what they have, while server and store are still there."""
        while self._running:
            service, process = self._running.pop()
            _signal(process, signal.SIGTERM)
            try:
                process.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                logger.warning("%s: does not stop, and is killed", service.name)
            _signal(process, signal.SIGKILL)  # whatever of its session is left
            process.wait()
            logger.info("%s: stopped", service.name)

    def log_of(self, service: Service) -> Path:
        """Return the file that a service's output goes to."""
        return self._logs / f"{service.name}.log"

    def _tail(self, service: Service) -> str:
        path = self.log_of(service)
        return f"the end of {path}:\n{path.read_text(errors='replace')[-_TAIL:]}"


def _signal(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:  # it and all that it started have ended
        return
