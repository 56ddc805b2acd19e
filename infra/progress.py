"""How a stage tells how far it is: to a terminal, a log, or (from `flows`) a Prefect artifact. Stages know only the protocol."""

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichBar

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Where a stage reports."""

    def update(self, done: int, total: int, unit: str, figures: Mapping[str, float] | None = None) -> None:
        """Say that `done` of `total` units ("images", "steps") are finished, with the newest figures (losses, rates) by name."""
        ...


class NullProgress:
    """Says nothing."""

    def update(self, done: int, total: int, unit: str, figures: Mapping[str, float] | None = None) -> None:
        """Ignore the report."""


class LogProgress:
    """Writes a log line at most every `seconds`, and at the end."""

    def __init__(self, name: str, seconds: float = 10.0) -> None:
        self.name, self.seconds = name, seconds
        self._last = 0.0
        self._start: tuple[float, int] | None = None

    def update(self, done: int, total: int, unit: str, figures: Mapping[str, float] | None = None) -> None:
        """Log `done/total`, the rate and the time left."""
        now = time.monotonic()
        self._start = self._start or (now, done)
        if done < total and now - self._last < self.seconds:
            return
        self._last = now
        since, first = self._start
        rate = (done - first) / (now - since) if now > since and done > first else 0.0
        left = f", {(total - done) / rate:.0f} s left" if rate and done < total else ""
        shown = "".join(f"  {name} {value:.4g}" for name, value in (figures or {}).items())
        logger.info("%s: %d/%d %s%s%s", self.name, done, total, unit, left, shown)


class RichProgress:
    """A bar with the time left on a terminal. Use as a context manager."""

    def __init__(self, name: str) -> None:
        self._bar = RichBar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[unit]}"), TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"), transient=True, console=Console(stderr=True),
        )  # fmt: skip
        self._task = self._bar.add_task(name, unit="", figures="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def update(self, done: int, total: int, unit: str, figures: Mapping[str, float] | None = None) -> None:
        """Move the bar."""
        shown = " ".join(f"{name} {value:.3g}" for name, value in list((figures or {}).items())[:3])
        self._bar.update(self._task, completed=done, total=total, unit=unit, figures=shown)


@contextmanager
def local_progress(name: str) -> Iterator[Progress]:
    """A bar on a terminal, lines in the log elsewhere."""
    if sys.stderr.isatty():
        with RichProgress(name) as bar:
            yield bar
    else:
        yield LogProgress(name)
