"""Two trainings of one machine do not share a device."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from infra.devices import exclusive, occupied_devices
from tests.flows.conftest import ROOT

HOLD = """
import sys, time
from pathlib import Path
from infra.devices import exclusive
with exclusive(sys.argv[2:], Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize(
    ("device", "processes", "visible", "names"),
    [
        ("cpu", 1, None, ()),
        ("cpu", 4, "0", ()),
        ("cuda", 1, None, ("cuda-0",)),
        ("cuda", 2, None, ("cuda-0", "cuda-1")),
        ("cuda", 2, "3,1", ("cuda-3", "cuda-1")),
        ("cuda:1", 1, "GPU-aa, GPU-bb", ("cuda-GPU-bb",)),
        ("cuda:1", 1, "", ("cuda-1",)),
        ("mps", 1, "3", ("mps-0",)),
    ],
)
def test_devices_are_named_as_the_machine_has_them(
    device: str, processes: int, visible: str | None, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert occupied_devices(device, processes) == names


def test_a_second_training_waits_for_the_device_until_the_first_is_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path), "cuda-0"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
    entered = threading.Event()

    def second() -> None:
        with exclusive(["cuda-1", "cuda-0"], tmp_path):
            entered.set()

    waiting = threading.Thread(target=second)
    try:
        assert first.stdout is not None and first.stdout.readline() == b"held\n"
        with exclusive(["cuda-1"], tmp_path):  # another device is free
            pass
        waiting.start()
        assert not entered.wait(0.5)
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert entered.wait(30)
    waiting.join()
