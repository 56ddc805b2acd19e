"""A worker's spare process: it has imported what a flow run needs before there is one, so that a run begins in tenths of a second.

It is started as a run's own process is, by the worker, in the same environment, and becomes one: signals, exit code and output are its own, and
nothing is forked. A run that asks for another command or environment than the spare has gets a process of its own.
"""

import contextlib
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.abc
from anyio import BrokenResourceError, ClosedResourceError
from prefect.utilities.processutils import consume_process_output, run_process

from flows.flow_run import OF_A_RUN, WAIT, order

logger = logging.getLogger(__name__)

REST_SECONDS: Final = 60.0
"""After a process that ended while it waited: one that cannot even be imported would be started for ever."""
PROGRAM: Final = "flows.flow_run"
"""What knows how to wait: only a command that names it is started as a spare."""


@dataclass(frozen=True)
class Start:
    """How a process is started: a spare fits a run whose process would be started in just this way."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    """Without the variables of the run itself."""
    streams: bool
    """Whether the worker shows its output."""

    @classmethod
    def of(cls, command: Sequence[str], environment: Mapping[str, str], streams: bool) -> "Start":
        """Leave out what is the run's own."""
        return cls(tuple(command), {name: value for name, value in environment.items() if not name.startswith(OF_A_RUN)}, streams)


@dataclass(frozen=True)
class _Waiting:
    start: Start
    process: anyio.abc.Process
    folder: "tempfile.TemporaryDirectory[str]"
    """Empty, for Prefect looks for settings in the folder that a process is started in."""


class Spare:
    """At most one process that waits for a run."""

    def __init__(self) -> None:
        self._waiting: _Waiting | None = None
        self._rests_until = float("-inf")

    @property
    def waits(self) -> bool:
        """Whether there is one."""
        return self._waiting is not None and self._waiting.process.returncode is None

    async def keep(self, start: Start) -> None:
        """Have a process of this kind wait, where there is none: at once, as it is not waited for. No other command than `PROGRAM` can."""
        if self._waiting is not None and not self.waits:
            logger.warning("the process that waited for a run ended with exit code %d", self._waiting.process.returncode)
            self._rests_until = time.monotonic() + REST_SECONDS
        if self._waiting is not None and not (self.waits and self._waiting.start == start):
            await self.close()
        if self._waiting is None and time.monotonic() >= self._rests_until and any(PROGRAM in part for part in start.command):
            folder = tempfile.TemporaryDirectory(prefix="distill-spare-")
            output = subprocess.PIPE if start.streams else subprocess.DEVNULL
            process = await anyio.open_process([*start.command, WAIT], stdout=output, stderr=output, env=start.environment, cwd=folder.name)
            self._waiting = _Waiting(start, process, folder)

    async def close(self) -> None:
        """End the process that waits."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            await _end(waiting)

    async def _take(self, start: Start, environment: Mapping[str, str], folder: str) -> _Waiting | None:
        """Make the process that waits the one of a run, if it fits."""
        waiting = self._waiting
        if waiting is None or waiting.start != start or not self.waits:
            return None
        self._waiting = None
        assert waiting.process.stdin is not None
        try:
            await waiting.process.stdin.send(order({name: environment[name] for name in environment if name.startswith(OF_A_RUN)}, folder))
            await waiting.process.stdin.aclose()
        except (BrokenResourceError, ClosedResourceError):  # it has just ended
            await _end(waiting)
            return None
        return waiting

    async def run_process(
        self,
        command: list[str],
        *,
        stream_output: bool,
        task_status: anyio.abc.TaskStatus[Any],
        task_status_handler: Callable[[anyio.abc.Process], Any],
        env: dict[str, str],
        cwd: Any = None,
        **options: Any,
    ) -> anyio.abc.Process:
        """Run a flow run's process to its end: what Prefect's function of that name does, with the spare where it fits."""
        taken = None if options else await self._take(Start.of(command, env, stream_output), env, str(cwd or Path.cwd()))
        if taken is None:
            logger.info("the run gets a process of its own")
            return await run_process(
                command, stream_output=stream_output, task_status=task_status, task_status_handler=task_status_handler,
                env=env, cwd=cwd, **options,
            )  # fmt: skip
        process = taken.process
        try:
            async with process:
                task_status.started(task_status_handler(process))
                await consume_process_output(process, sys.stdout, sys.stderr)
                await process.wait()
        finally:
            await _end(taken)
        return process


async def _end(waiting: _Waiting) -> None:
    """End a process that still runs, let go of its pipes, and of its folder: it may have been on its way out of there until now."""
    with contextlib.suppress(ProcessLookupError):
        waiting.process.terminate()
    with anyio.CancelScope(shield=True):
        await waiting.process.aclose()
    waiting.folder.cleanup()
