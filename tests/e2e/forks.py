"""`distill` in children of a process that has imported everything: a command costs its own work alone, and can be killed many times over.

`python -m tests.e2e.forks` reads commands from its standard input, a line each, as JSON: the arguments, and the file for what it says. It answers
each with two lines: the child's process id, and once it has ended its exit code, negative for a signal.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from tests.e2e.nano import MARK, POLL_SECONDS, Place, started_runs, wait_for_orphans

_LIMIT_SECONDS = 300
_IMPORTED = (
    *("flows.cli", "flows.preparation", "stages.preflight", "stages.runner", "stages.lightning", "infra.store.s3"),
    *("diffusers.guiders", "fsspec.implementations.chained", "multiprocessing.queues", "pandas", "peft", "s3fs"),
)


@dataclass(frozen=True)
class Child:
    """A command that runs, or has run."""

    pid: int
    log: Path
    ended: Callable[[], int]
    """Waits for its end; its exit code."""

    @property
    def told(self) -> str:
        """What it has said so far."""
        return self.log.read_text(errors="replace")

    def kill_after(self, run: str, seconds: float, once: Callable[[], bool] | None = None) -> int:
        """End it by SIGKILL so long after it has begun with the stage run and `once` is true; its exit code, another where it came to its end before.

        Only the command itself is killed: what it started has to end by itself, and is waited for.
        """
        deadline = time.monotonic() + _LIMIT_SECONDS
        while not (run in started_runs(self.told) and (once is None or once())) and self._lives():
            assert time.monotonic() < deadline, self.told
            time.sleep(POLL_SECONDS)
        until = time.monotonic() + seconds
        while time.monotonic() < until and self._lives():
            time.sleep(POLL_SECONDS)
        if self._lives():
            os.kill(self.pid, signal.SIGKILL)
        code = self.ended()
        wait_for_orphans(self.log.stem)
        return code

    def _lives(self) -> bool:
        return Path(f"/proc/{self.pid}/cmdline").exists()


@dataclass(frozen=True)
class Forks:
    """The process that forks."""

    process: "subprocess.Popen[str]"
    folder: Path

    def start(self, *arguments: str) -> Child:
        """Start `distill ARGUMENTS`; one at a time."""
        assert self.process.stdin is not None and self.process.stdout is not None
        log = self.folder / f"{uuid.uuid4().hex}.log"
        log.touch()
        self.process.stdin.write(json.dumps({"arguments": arguments, "log": str(log)}) + "\n")
        self.process.stdin.flush()
        answers = self.process.stdout
        return Child(int(answers.readline()), log, lambda: int(answers.readline()))

    def run(self, *arguments: str) -> Child:
        """Run `distill ARGUMENTS` to its end, which must be good."""
        child = self.start(*arguments)
        assert child.ended() == 0, child.told
        return child


@contextmanager
def forks(place: Place) -> Iterator[Forks]:
    """A process that forks children which work in a place."""
    (place.folder / "tmp").mkdir(parents=True, exist_ok=True)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.forks"],
        cwd=place.folder,
        env=place.surroundings,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Forks(process, place.folder)


def _serve() -> None:
    import_module("tests.tiny_pipelines")  # which knows the classes that diffusers and transformers load late
    for name in _IMPORTED:
        import_module(name)
    assert threading.active_count() == 1, "a thread of this process would not be in its children"
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            _work(job["arguments"], Path(job["log"]))
        print(child, flush=True)  # noqa: T201 - the answer
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)  # noqa: T201


def _work(arguments: list[str], log: Path) -> None:
    code: object = 1
    os.environ[MARK] = log.stem  # in the environment of all that it starts
    with log.open("wb") as file, Path(os.devnull).open() as nothing:
        for number, replacement in enumerate((nothing, file, file)):
            os.dup2(replacement.fileno(), number)
    try:
        import_module("flows.cli").main(arguments)
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
