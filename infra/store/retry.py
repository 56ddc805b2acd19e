"""Try again what may pass: exponential backoff with full jitter."""

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from schemas.errors import Transient

logger = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_WAIT_SECONDS = 0.2
LONGEST_WAIT_SECONDS = 10.0


def wait_seconds(attempt: int) -> float:
    """Seconds to wait after failed attempt number `attempt` (from 0): uniform over an interval that doubles, so that writers spread."""
    longest: float = min(FIRST_WAIT_SECONDS * 2**attempt, LONGEST_WAIT_SECONDS)
    return random.uniform(longest / 2, longest)


def retried(call: Callable[[int], T], *, passing: Callable[[Exception], bool], retries: int, what: str) -> T:
    """Call `call(attempt)` until it returns; an error for which `passing` is true is tried again up to `retries` times.

    Raises `Transient` when the last try failed for a passing reason too; any other error goes through unchanged, at once.
    """
    for attempt in range(retries + 1):
        try:
            return call(attempt)
        except Exception as error:
            if not passing(error):
                raise
            if attempt == retries:
                raise Transient(f"{what} failed {attempt + 1} times, last with: {type(error).__name__}: {error}") from error
            pause = wait_seconds(attempt)
            logger.debug("%s: %s: %s; trying again in %.1f s", what, type(error).__name__, error, pause)
            time.sleep(pause)
    raise AssertionError("unreachable")
