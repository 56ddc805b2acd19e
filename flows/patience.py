"""What may pass by itself (a store or a server that is gone for a while), and flows that wait for it."""

import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

import httpx

from schemas.errors import Transient

R = TypeVar("R")
logger = logging.getLogger(__name__)

DELAYS_SECONDS: Final = (10.0, 60.0)
"""Waits before the further tries of a flow."""
TRIED: Final = "raised inside a task, which has its own tries"


@contextmanager
def tried_by_task() -> Iterator[None]:
    """Note on what the block raises that its task tries it again, and the flow need not."""
    try:
        yield
    except Exception as error:
        error.add_note(TRIED)
        raise


def may_pass(error: object) -> bool:
    """True for failures of connections and of servers, also where Prefect's result storage or client raised them; false for any mistake."""
    from infra.store.s3 import may_pass as passes_on_store  # noqa: PLC0415 - half a second, and most runs meet no error

    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return isinstance(error, Transient | httpx.TransportError) or (isinstance(error, Exception) and passes_on_store(error))


def tried_again(body: Callable[..., R]) -> Callable[..., R]:
    """Wrap a flow's body: what may pass is waited for within the run, where no task has. Finished stages are found by the next try."""

    @functools.wraps(body)
    def patient(*arguments: object, **options: object) -> R:
        for seconds in DELAYS_SECONDS:
            try:
                return body(*arguments, **options)
            except Exception as error:
                if not may_pass(error) or TRIED in getattr(error, "__notes__", ()):
                    raise
                logger.warning("tried again in %g s: %s: %s", seconds, type(error).__name__, error)
            time.sleep(seconds)
        return body(*arguments, **options)

    return patient
