"""Devices of this machine that training has to itself, whatever starts it: workers, servers, or a shell."""

import contextlib
import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER = "diffusion-distillery-devices"


def occupied_devices(device: str, processes: int = 1) -> tuple[str, ...]:
    """Name the physical devices that processes on `device` use; none for a CPU.

    `cuda` stands for the first `processes` devices, `cuda:1` for one, counted as `CUDA_VISIBLE_DEVICES` has them.
    """
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return ()
    numbers = [int(index)] if index else list(range(processes))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if kind == "cuda" else []
    names = [visible[number].strip() if number < len(visible) and visible[number] else str(number) for number in numbers]
    return tuple(f"{kind}-{name}" for name in names)


@contextlib.contextmanager
def exclusive(devices: Sequence[str], folder: Path | None = None) -> Iterator[None]:
    """Hold the devices for the block; wait for those that another process of this machine holds. A killed holder's are free at once.

    The locks are files in `folder`, which all users of the machine share; None: in the system's temporary folder.
    """
    folder = folder or Path(tempfile.gettempdir()) / FOLDER
    with contextlib.ExitStack() as held:
        for device in sorted(devices):  # in one order everywhere: else two could each wait for the other's
            held.enter_context(_locked(folder / f"{device}.lock", device))
        yield


@contextlib.contextmanager
def _locked(path: Path, device: str) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    with contextlib.suppress(PermissionError):  # another user's: it was opened to all when it was made
        path.parent.chmod(0o1777)
        path.chmod(0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting: %s is used by another training of this machine (DISTILL_SHARE_DEVICES=true shares it)", device)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
