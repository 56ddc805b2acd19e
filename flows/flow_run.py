"""The process of one flow run on a process pool: `python -m flows.flow_run`, Prefect's engine for the run that the environment names.

With `--wait` it is a spare (`flows.spare`): it imports what a run needs, which takes seconds, and waits to be told on its standard input which run it
is. Then it is the process that would have been started for the run, without the seconds.
"""

import json
import os
import runpy
import socket
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from flows.environment import API_URL

WAIT: Final = "--wait"
OF_A_RUN: Final = "PREFECT__"
"""How the variables begin that Prefect's worker makes anew for every run. Nothing reads them when it is imported; a setting is `PREFECT_`."""
SERVER_SECONDS: Final = 300.0
"""How long a run that is about to begin waits for a server that is started again."""
IMPORTED = ("flows.chain", "flows.single", "prefect.runner", "prefect.flow_engine", "prefect.task_engine", "prefect.engine")
"""What a spare has imported, beside the packages of the stages: those with networks are large, and few runs need them all."""
ENGINE = "prefect.engine"


def main() -> None:
    """Run the flow run that the environment names, or that the standard input will name."""
    if WAIT in sys.argv:
        sys.argv.remove(WAIT)
        for name in IMPORTED:
            import_module(name)
        told = sys.stdin.readline()
        if not told:  # the worker has ended
            return
        _become(**json.loads(told))
        sys.modules.pop(ENGINE, None)  # it is the program now
    await_server(os.environ.get(API_URL, ""))
    runpy.run_module(ENGINE, run_name="__main__")


def _become(environment: dict[str, str], folder: str) -> None:
    """Be where the run's process would have been started, with its variables."""
    for name in [name for name in os.environ if name.startswith(OF_A_RUN)]:
        del os.environ[name]
    os.environ.update(environment)
    before = str(Path.cwd())
    os.chdir(folder)
    sys.path[:] = [folder if entry == before else entry for entry in sys.path]  # `python -m` puts the folder that it is started in there
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, sys.stdin.fileno())
    os.close(nothing)


def await_server(url: str, seconds: float = SERVER_SECONDS) -> None:
    """Wait while nothing listens at the address: Prefect's client would give up at once, as it waits only for a server that it has reached before."""
    place = urlsplit(url)
    end = time.monotonic() + seconds
    while place.hostname is not None and time.monotonic() < end:
        try:
            socket.create_connection((place.hostname, place.port or (443 if place.scheme == "https" else 80)), timeout=5).close()
        except ConnectionRefusedError:
            time.sleep(0.5)
        except OSError:  # reached by a proxy, perhaps: the client's to say
            return
        else:
            return


def order(environment: dict[str, str], folder: str) -> bytes:
    """Return what a waiting process is told: the variables of its run, all others it has already, and the folder to work in."""
    told: dict[str, Any] = {"environment": environment, "folder": folder}
    return json.dumps(told).encode() + b"\n"


if __name__ == "__main__":
    main()
