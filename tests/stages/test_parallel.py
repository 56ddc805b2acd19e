"""Maps over processes: order, errors, and workers that die."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from schemas.errors import BadInput, RunFailed
from stages.parallel import map_processes
from tests.stages.killed import ROOT


def negative(value: int) -> int:
    return -value


def refuse(value: int) -> int:
    raise BadInput(f"item {value}")


def die(value: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return value


def sleep(folder: str) -> None:
    (Path(folder) / f"{os.getpid()}.pid").touch()
    time.sleep(600)


def is_alive(pid: int) -> bool:
    """Not gone, nor dead and waiting for somebody to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_in_one_process_nothing_is_started() -> None:
    assert list(map_processes(lambda value: -value, [3, 1, 2], 1)) == [-3, -1, -2]
    assert list(map_processes(negative, [], 4)) == []


@pytest.mark.slow
def test_results_come_in_order_and_errors_as_they_are() -> None:
    assert list(map_processes(negative, list(range(20)), 2)) == [-value for value in range(20)]
    with pytest.raises(BadInput, match="item 0"):
        list(map_processes(refuse, [0, 1], 2))
    with pytest.raises(RunFailed, match="killed for want of memory"):
        list(map_processes(die, [0, 1], 2))


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = f"from tests.stages import test_parallel as t; list(t.map_processes(t.sleep, [{str(tmp_path)!r}] * 2, 2))"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(workers := [int(path.stem) for path in tmp_path.glob("*.pid")]) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)
