"""Timing the steps of a loop beside the parts it is made of, and a device's matrix rate."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Final, NamedTuple

import torch

from schemas.errors import RunFailed

WARM_UP: Final = 5
"""Steps that are not counted."""


class Enough(RunFailed):
    """Ends a run of the loop one step early: one that fails by itself writes no last checkpoint, which for SDXL is tens of gigabytes."""


class Interleaved:
    """The loop's progress: called after each of its steps, it does the bare parts once, and keeps the times of both."""

    def __init__(self, bare: Callable[[], None], device: torch.device) -> None:
        self.bare, self.device = bare, device
        self.loop: list[Times] = []
        """Of each step of the loop but the first."""
        self.parts: list[Times] = []
        """Of the bare parts after each step, the first included."""
        self._since: Times | None = None

    def update(self, done: int, total: int, unit: str, figures: Mapping[str, float] | None = None) -> None:  # noqa: ARG002
        """See the class. Raises `Enough` before the last step."""
        now = self._now()
        if self._since is not None:
            self.loop.append(now.after(self._since))
        with default_kernels():
            self.bare()
        self._since = self._now()
        self.parts.append(self._since.after(now))
        if done == total - 1:
            raise Enough

    def _now(self) -> "Times":
        wait(self.device)
        return Times(time.perf_counter(), time.process_time())

    def figures(self) -> dict[str, float]:
        """After the warm-up. A step's ratio is its wall time over the mean of the bare parts on either side."""
        loop, parts = self.loop[WARM_UP:], self.parts[WARM_UP:]
        ratios = [2 * step.wall / (before.wall + after.wall) for step, (before, after) in zip(loop, pairwise(parts), strict=True)]
        return {
            "loop_ms": 1e3 * statistics.median(one.wall for one in loop),
            "bare_ms": 1e3 * statistics.median(one.wall for one in parts),
            "ratio": statistics.median(ratios),
            "cpu_ratio": statistics.median(one.processor for one in loop) / statistics.median(one.processor for one in parts),
        }


class Times(NamedTuple):
    """Seconds, of the clock and of this process on its cores."""

    wall: float
    processor: float

    def after(self, since: "Times") -> "Times":
        """What has passed."""
        return Times(self.wall - since.wall, self.processor - since.processor)


@contextmanager
def default_kernels() -> Iterator[None]:
    """What torch chooses where nobody asks for the same bits every time: the loop does, and pays for it."""
    strict, deterministic = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=True)
        torch.backends.cudnn.deterministic = deterministic


def matrix_rate(device: torch.device, side: int) -> float:
    """10^12 operations a second of a bfloat16 matrix product, the best of ten."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        wait(device)
        started = time.perf_counter()
        a @ b
        wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best / 1e12


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
