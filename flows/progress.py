"""A stage's progress as a Prefect artifact, beside the terminal or the log."""

import logging
import time
from collections.abc import Mapping
from typing import cast
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException

from infra.progress import Progress

logger = logging.getLogger(__name__)


_SHARE = 20
"""A report that took long (Prefect's client tries for more than a minute to reach a server that is gone) is followed by a pause so many times as
long, so that reporting slows no stage by more than a twentieth."""


class PrefectProgress:
    """Updates one progress artifact at most every `seconds` (an update costs some 30 ms) and at the end, and hands each report on."""

    def __init__(self, name: str, inner: Progress, seconds: float = 5.0) -> None:
        self.name, self.seconds = name, seconds
        self._inner = inner
        self._artifact: UUID | None = None
        self._next = float("-inf")

    def update(self, done: int, total: int, unit: str, figures: Mapping[str, float] | None = None) -> None:
        """Report to the run's page. A server that does not answer stops no training."""
        self._inner.update(done, total, unit, figures)
        now = time.monotonic()
        if done < total and now < self._next:
            return
        shown = "".join(f", {name} {value:.4g}" for name, value in (figures or {}).items())
        share, description = 100.0 * done / max(total, 1), f"{self.name}: {done}/{total} {unit}{shown}"
        try:
            if self._artifact is None:
                self._artifact = cast(
                    UUID, create_progress_artifact(share, description=description)
                )  # a coroutine only where one is awaited
            else:
                update_progress_artifact(self._artifact, share, description=description)
        except (httpx.HTTPError, PrefectException) as error:
            logger.warning("%s: progress could not be reported to Prefect: %s", self.name, error)
        taken = time.monotonic() - now
        self._next = now + taken + max(self.seconds, _SHARE * taken)
