"""What a stage run costs: time, GPUs, memory, bytes over the store. Measured from the runner's start of it to its artifact."""

import contextlib
import re
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from infra.store import Traffic
from schemas.manifest import Cost


def _children_peak() -> int:
    return _bytes(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def _own_peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says begins with the memory of whoever started this process
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        if found is not None:
            return int(found[1]) * 1024
    return _bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _bytes(maxrss: int) -> int:
    return maxrss if sys.platform == "darwin" else maxrss * 1024


@dataclass(frozen=True)
class Meter:
    """Runs from its making. Travels to the processes that a stage starts."""

    gpus: int = 0
    """Devices that the stage has, 0 on a CPU."""
    traffic: Traffic | None = None
    """Counts of the store. None: not counted."""
    started: float = field(default_factory=time.monotonic)
    """A `time.monotonic()` value, which the processes of one machine share."""
    earlier_children: int = field(default_factory=_children_peak)
    """Peak memory of this process' children before, in bytes: the kernel keeps but the highest of all."""

    @classmethod
    def start(cls, device: str, processes: int, traffic: Traffic) -> "Meter":
        """Begin to measure a stage on `device`: peaks that were reached before count no more, as far as the system forgets them (Linux, CUDA)."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        if device.startswith("cuda"):
            import torch  # noqa: PLC0415 - seconds, and not needed on a CPU

            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                for number in range(torch.cuda.device_count()):
                    torch.cuda.reset_peak_memory_stats(number)
        return cls(gpus=_gpus(device, processes), traffic=traffic)

    def cost(self) -> Cost:
        """What it took so far."""
        seconds = time.monotonic() - self.started
        read, written = self.traffic.total() if self.traffic is not None else (0, 0)
        children = _children_peak()
        return Cost(
            wall_seconds=seconds,
            gpu_hours=self.gpus * seconds / 3600,
            peak_memory_bytes=max(_own_peak(), children if children > self.earlier_children else 0),
            peak_device_bytes=_device_peak() if self.gpus else None,
            bytes_read=read,
            bytes_written=written,
        )


def _gpus(device: str, processes: int) -> int:
    if device == "cpu":
        return 0
    if device != "cuda":
        return 1
    import torch  # noqa: PLC0415

    return min(processes, torch.cuda.device_count())


def _device_peak() -> int | None:
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():  # mps keeps no such figure
        return None
    return max(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count())) or None
