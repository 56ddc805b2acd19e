"""Prefect's embedded server for one command, in a session of its own.

Prefect starts one by itself too, but as a child in the terminal's process group: Ctrl-C then kills it before the run's state is reported, and
kill -9 of the run leaves it behind. Here it outlives Ctrl-C by the few seconds it is needed, and on Linux it dies with us.
"""

import atexit
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from http import HTTPStatus
from typing import Self

from flows import environment
from schemas.errors import BadInput, RunFailed

logger = logging.getLogger(__name__)

_SERVE = ("--factory", "prefect.server.api.server:create_app", "--log-level", "error", "--lifespan", "on")
_PR_SET_PDEATHSIG = 1


class EmbeddedServer:
    """A Prefect server on a free port of the loopback interface, with the user's own database. Nothing when a server is configured."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._url = ""

    def start(self) -> Self:
        """Start it, make it the server of this process, and return at once: it needs some seconds, as long as importing Prefect takes.

        Call before Prefect is imported, and `wait` before the first flow.
        """
        if environment.server_is_configured():
            return self
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self._url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
            self._process = subprocess.Popen(
                [sys.executable, "-m", "uvicorn", *_SERVE, "--fd", str(listener.fileno())],
                env=os.environ | {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1", "PREFECT_UI_ENABLED": "0"},
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509 - the first thing a command starts
            )
        os.environ[environment.API_URL] = self._url
        atexit.register(self.stop)  # before Prefect registers its own: that runs first, and still sends logs
        return self

    def wait(self) -> None:
        """Wait until it answers. Raises `RunFailed` when it does not, and `BadInput` when a configured server does not."""
        if self._process is None:
            check_configured()
            return
        limit = float(os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"])
        end = time.monotonic() + limit
        while not answers(f"{self._url}/health"):
            if self._process.poll() is not None:
                raise RunFailed(f"Prefect's embedded server ended with exit code {self._process.returncode}; try: prefect server start")
            if time.monotonic() > end:
                self.stop()
                raise RunFailed(f"Prefect's embedded server did not answer within {limit:.0f} s; try: prefect server start")
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop it, if this object started one."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        if os.environ.get(environment.API_URL) == self._url:
            del os.environ[environment.API_URL]


def check_configured() -> None:
    """Ask the configured server whether it is there and lets us in. Raises `BadInput`."""
    from prefect.client.orchestration import get_client  # noqa: PLC0415 - this module is imported before Prefect
    from prefect.exceptions import PrefectHTTPStatusError  # noqa: PLC0415
    from prefect.settings import PREFECT_API_URL  # noqa: PLC0415

    client = get_client(sync_client=True)
    problem = client.api_healthcheck()
    if problem is not None:
        raise BadInput(
            f"Prefect server {PREFECT_API_URL.value()}: does not answer ({problem}); "
            "start it with: prefect server start, or leave PREFECT_API_URL unset"
        )
    try:
        client.api_version()  # its health anybody may ask for
    except PrefectHTTPStatusError as error:
        if error.response.status_code != HTTPStatus.UNAUTHORIZED:
            raise
        raise BadInput(
            f"Prefect server {PREFECT_API_URL.value()}: asks for user:password; expected them in {environment.API_AUTHENTICATION}"
        ) from error


def answers(url: str) -> bool:
    """Ask whether a server's address answers with success."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def die_with_parent() -> None:
    """Have the kernel end this process with its parent (Linux). Called in a child before it becomes the program."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
