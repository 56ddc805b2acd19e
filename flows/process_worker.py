"""Prefect's process worker, which importing this module makes one that outlives a run's retry."""

import warnings
from typing import TYPE_CHECKING

from prefect.workers.process import ProcessWorker

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun
    from prefect.client.schemas.responses import WorkerFlowRunResponse

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Type 'PatientProcessWorker'.* matches existing registered type")

    class PatientProcessWorker(ProcessWorker):
        """Takes a run again only when it has let go of its place.

        Somebody who retries a failed run at once has it scheduled while its process is still ending. Prefect's worker (3.8) would take a second
        place for it, which its limiter refuses by an error that ends the worker, and every other run with it.
        """

        async def _submit_scheduled_flow_runs(self, flow_run_response: "list[WorkerFlowRunResponse]") -> "list[FlowRun]":
            ending = self._limiter.statistics().borrowers if self._limiter is not None else ()
            return await super()._submit_scheduled_flow_runs([entry for entry in flow_run_response if entry.flow_run.id not in ending])
