"""A run whose process is told to end goes on elsewhere: the stage saves its checkpoint, and the run waits for a worker again.

A machine that is taken away sends SIGTERM to the run's own process. Prefect alone would call the run crashed; here it is `AwaitingRetry`, and the
next worker of its pool takes it up. A run that a person cancelled stays cancelled, and one that no worker runs ends, as it always did.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.responses import SetStateStatus
from prefect.context import FlowRunContext
from prefect.exceptions import Pause, PrefectException, TerminationSignal
from prefect.states import AwaitingRetry

logger = logging.getLogger(__name__)

WAIT_SECONDS: Final = 10.0
"""Before the run is taken up: by then a worker that shares the machine's fate takes nothing any more."""
MESSAGE: Final = "its process was told to end (SIGTERM): what was finished is kept, and the next worker of its pool goes on from there"


@contextmanager
def requeued_when_preempted() -> Iterator[None]:
    """Give the current flow run back to its pool where a termination signal ends the block and nobody cancelled the run.

    For the whole body of a flow: stages have saved their checkpoints when the signal, an exception by then, comes by here.
    """
    try:
        yield
    except TerminationSignal:
        context = FlowRunContext.get()
        run = None if context is None else context.flow_run
        state = None if run is None or run.deployment_id is None else _requeued(run)
        if state is None:
            raise
        logger.warning("preempted: %s", MESSAGE)
        raise Pause(state=state) from None  # what ends a process without a verdict on its run, and with exit code 0


def _requeued(run: FlowRun) -> State | None:
    """Have the run scheduled again, unless the server knows of it something else than that it runs."""
    try:
        with get_client(sync_client=True) as client:
            known = client.read_flow_run(run.id).state
            if known is None or not known.is_running():
                return None
            wanted: State[Any] = AwaitingRetry(scheduled_time=datetime.now(UTC) + timedelta(seconds=WAIT_SECONDS), message=MESSAGE)
            answer = client.set_flow_run_state(run.id, wanted, force=True)
    except (httpx.HTTPError, PrefectException) as error:
        logger.warning("preempted, and the server cannot be told: %s", error)
        return None
    return answer.state if answer.status is SetStateStatus.ACCEPT else None
