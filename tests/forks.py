"""Programs in children of a process that has imported torch and diffusers: each costs its own work alone, and can be killed many times over.

`python -m tests.forks` reads programs from its standard input, a line each, as JSON, and answers each with the process id of its child. When a child
has ended, its exit code stands in the file that the line named, negative for a signal. Prefect is not imported there, as it reads the environment
when it is; and all children have one seed of hashes, so that what must not depend on it is to be compared with a process of its own.
"""

import atexit
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_POLL_SECONDS = 0.005
_IMPORTED = (
    "tests.tiny_pipelines",  # which knows the classes that diffusers and transformers load late
    *("flows.cli", "flows.preparation", "stages.preflight", "stages.runner", "stages.lightning", "infra.store.s3"),
    *("diffusers.guiders", "fsspec.implementations.chained", "multiprocessing.queues", "pandas", "peft", "s3fs"),
)


@dataclass(frozen=True)
class _Job:
    program: str
    arguments: tuple[str, ...]
    folder: str
    environment: dict[str, str]
    output: str
    log: str
    code: str


@dataclass(frozen=True)
class Fork:
    """A child, as `subprocess.Popen` has it."""

    pid: int
    code: Path

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return int(self.code.read_text()) if self.code.exists() else None

    def wait(self, timeout: float = float("inf")) -> int:
        """Wait for its end; its exit code."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(_POLL_SECONDS)
        return code

    def terminate(self) -> None:
        """Ask it to end."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


def fork(program: str, *arguments: str, folder: Path, environment: Mapping[str, str], output: Path, log: Path) -> Fork:
    """Start what `python -c PROGRAM ARGUMENTS` would, in a process group of its own, with standard output and error in files."""
    output.touch()
    log.touch()
    code = log.with_suffix(".code")
    asked = _Job(program, arguments, str(folder), dict(environment), str(output), str(log), str(code))
    process = _forking()
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(asdict(asked)) + "\n")
    process.stdin.flush()
    return Fork(int(process.stdout.readline()), code)


@cache
def _forking() -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "DISTILL", "AWS"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.forks"], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(process.communicate)
    return process


def _serve() -> None:
    for name in _IMPORTED:
        import_module(name)
    assert threading.active_count() == 1, "a thread of this process would not be in its children"
    children: dict[int, tuple[int, Path]] = {}
    with selectors.DefaultSelector() as ready:
        ready.register(sys.stdin, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fileobj is sys.stdin:
                    if not (line := sys.stdin.readline()):
                        return
                    pid = _start(_Job(**json.loads(line)), children)
                    ready.register(next(reversed(children)), selectors.EVENT_READ)
                    print(pid, flush=True)  # noqa: T201 - the answer
                else:
                    ready.unregister(key.fd)
                    os.close(key.fd)
                    _tell_end(*children.pop(key.fd))


def _start(job: _Job, children: dict[int, tuple[int, Path]]) -> int:
    pid = os.fork()
    if pid == 0:
        _work(job)
    os.setpgid(pid, pid)  # it may be killed before it has come to anything
    children[os.pidfd_open(pid)] = pid, Path(job.code)
    return pid


def _tell_end(pid: int, file: Path) -> None:
    whole = file.with_suffix(".ended")
    whole.write_text(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
    whole.rename(file)


def _work(job: _Job) -> None:
    code: object = 1
    os.environ.clear()
    os.environ.update(job.environment)
    os.chdir(job.folder)
    sys.argv[:] = ["-c", *job.arguments]
    with Path(os.devnull).open() as nothing, Path(job.output).open("wb") as output, Path(job.log).open("wb") as log:
        for number, replacement in enumerate((nothing, output, log)):
            os.dup2(replacement.fileno(), number)
    try:
        main: Any = ModuleType("__main__")  # as `python -c` has it: processes that this one starts anew import no module for it
        sys.modules["__main__"] = main
        exec(job.program, main.__dict__)
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:  # noqa: BLE001 - said, and an exit code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    _serve()
