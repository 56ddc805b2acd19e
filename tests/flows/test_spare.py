"""The process that a worker has ready for its next run: it is that run's own process, or it is not used."""

import asyncio
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from infra.seaweedfs import free_ports
from tests.flows.conftest import ROOT

PROGRAM = "import flows.flow_run as program; program.IMPORTED = (); program.ENGINE = 'tests.flows.told'; program.main()"
COMMAND = [sys.executable, "-c", PROGRAM]
ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "COLOUR": "red"}


async def run(spare: Any, folder: Path, command: list[str] = COMMAND, signalled: int | None = None, **variables: str) -> tuple[int, int]:
    """Run a flow run's process: its id, and its exit code."""
    ended: list[Any] = []

    async def body(*, task_status: Any) -> None:
        options = {"stream_output": True, "task_status_handler": lambda process: process.pid}
        ended.append(await spare.run_process(command, env=ENVIRONMENT | variables, cwd=folder, task_status=task_status, **options))

    async with anyio.create_task_group() as group:
        pid = await group.start(body)
        if signalled is not None:
            while "arguments" not in (folder / "said").read_text():
                await anyio.sleep(0.02)
            os.kill(pid, signalled)
    return pid, ended[0].returncode


def with_spare(scenario: Callable[[Any], Awaitable[None]]) -> None:
    """Run a scenario with a spare that is closed at its end."""
    from flows.spare import Spare

    async def whole() -> None:
        spare = Spare()
        try:
            with anyio.fail_after(600):
                await scenario(spare)
        finally:
            await spare.close()

    asyncio.run(whole())


def test_a_run_takes_the_process_that_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flows.spare import Start

    async def scenario(spare: Any) -> None:
        await spare.keep(Start.of(COMMAND, ENVIRONMENT | {"PREFECT__FLOW_RUN_ID": "earlier"}, True))
        waiting = spare._waiting
        pid, code = await run(spare, tmp_path, PREFECT__FLOW_RUN_ID="7", PREFECT__CODE="3")
        assert (pid, code) == (waiting.process.pid, 3)
        assert not Path(waiting.folder.name).exists() and not spare.waits
        other, _ = await run(spare, tmp_path, PREFECT__FLOW_RUN_ID="8")
        assert other != pid

    with_spare(scenario)
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    told = {"COLOUR": "red", "PREFECT__FLOW_RUN_ID": "7", "PREFECT__CODE": "3"}
    assert first == {"told": told, "folder": str(tmp_path), "arguments": [], "input": os.devnull}
    assert second["told"] == {"COLOUR": "red", "PREFECT__FLOW_RUN_ID": "8"} and second["folder"] == str(tmp_path)


def test_what_would_be_started_otherwise_gets_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.spare import Start

    monkeypatch.setattr("flows.spare.REST_SECONDS", 600.0)

    async def scenario(spare: Any) -> None:
        await spare.keep(Start.of(["python", "-m", "prefect.engine"], ENVIRONMENT, True))
        assert not spare.waits, "it would not know how"
        start = Start.of(COMMAND, ENVIRONMENT, True)
        await spare.keep(start)
        first = spare._waiting.process
        await spare.keep(start)
        assert spare._waiting.process is first
        pid, _ = await run(spare, tmp_path, COLOUR="blue")
        assert pid != first.pid and spare.waits
        first.kill()
        await first.wait()
        pid, code = await run(spare, tmp_path)
        assert (pid != first.pid, code) == (True, 0)
        await spare.keep(start)
        assert not spare.waits, "it may have ended because it cannot be imported"
        spare._rests_until = 0.0
        await spare.keep(start)
        second = spare._waiting.process
        await spare.keep(Start.of(COMMAND, ENVIRONMENT | {"COLOUR": "green"}, True))
        assert second.returncode is not None and spare._waiting.process is not second

    with_spare(scenario)
    assert [json.loads(line)["told"] for line in capsys.readouterr().out.splitlines()] == [{"COLOUR": "blue"}, {"COLOUR": "red"}]


def test_signals_reach_the_run_and_a_worker_that_is_gone_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.spare import Start

    said = tmp_path / "said"
    with said.open("w") as output:
        monkeypatch.setattr(sys, "stdout", output)

        async def scenario(spare: Any) -> None:
            start = Start.of(COMMAND, ENVIRONMENT, True)
            await spare.keep(start)
            taken = spare._waiting.process.pid
            assert await run(spare, tmp_path, signalled=signal.SIGTERM, PREFECT__SECONDS="600") == (taken, -signal.SIGTERM)
            await spare.keep(start)
            waiting = spare._waiting.process
            await waiting.stdin.aclose()  # what the end of the worker is for it
            assert await waiting.wait() == 0

        with_spare(scenario)


def test_a_run_that_begins_waits_for_its_server() -> None:
    from flows.flow_run import await_server

    port = free_ports(1)[0]
    began = time.monotonic()
    await_server(f"http://127.0.0.1:{port}/api", seconds=0.3)
    assert time.monotonic() - began >= 0.3, "refused"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        later = threading.Timer(0.6, listener.listen)
        began = time.monotonic()
        later.start()
        await_server(f"http://127.0.0.1:{port}/api")
        assert time.monotonic() - began >= 0.6
        later.join()
    await_server("")
    await_server("http://host.invalid/api")
