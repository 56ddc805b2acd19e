"""Prefect's process worker, which importing this module makes one that outlives a run's retry and its server, and keeps a process ready."""

import logging
import os
import warnings
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
from prefect.client.schemas.objects import FlowRun
from prefect.runner import _starter_engine
from prefect.settings import get_current_settings
from prefect.utilities.processutils import command_from_string, sanitize_subprocess_env
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker

from flows.spare import Spare, Start

if TYPE_CHECKING:
    from prefect.client.schemas.responses import WorkerFlowRunResponse

logger = logging.getLogger(__name__)

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Type 'PatientProcessWorker'.* matches existing registered type")

    class PatientProcessWorker(ProcessWorker):
        """Takes a run again only when it has let go of its place, waits for a server that is gone, and keeps a spare process.

        Somebody who retries a failed run at once has it scheduled while its process is still ending. Prefect's worker (3.8) would take a second
        place for it, which its limiter refuses by an error that ends the worker, and every other run with it. It also ends by itself when its
        server has not answered for a dozen questions.
        """

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._spare = Spare()
            self._template: dict[str, Any] | None = None
            self._refused: dict[str, Any] | None = None
            self._server_is_gone = False
            # Prefect's starter asks its module for it, and so also for a replacement; were that to change, runs would only begin later.
            _starter_engine.run_process = self._spare.run_process  # type: ignore[attr-defined,assignment]

        async def get_and_submit_flow_runs(self) -> list[FlowRun]:
            """Take what is scheduled; nothing while the server is gone."""
            try:
                found = await super().get_and_submit_flow_runs()
                await self._keep_spare()
            except httpx.HTTPError as error:
                self._bear(error)
                return []
            if self._server_is_gone:
                logger.info("Prefect's server answers again")
            self._server_is_gone = False
            return found

        async def sync_with_backend(self) -> None:
            """Tell the server that the worker is there. Raises what keeps it from doing so the first time."""
            try:
                await super().sync_with_backend()
            except httpx.HTTPError as error:
                if not self._has_successfully_synced:
                    raise
                self._bear(error)

        async def teardown(self, *exc_info: Any) -> None:
            """Stop, the spare first."""
            await self._spare.close()
            await super().teardown(*exc_info)

        def _bear(self, error: httpx.HTTPError) -> None:
            """Wait for a server that is gone, or is broken for a while. Raises any other error."""
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
                raise error
            if not self._server_is_gone:
                logger.warning("Prefect's server does not answer (%s): runs that have begun go on, others wait for it", error)
            self._server_is_gone = True

        async def _keep_spare(self) -> None:
            """Have a process ready that is started as that of a run would be which changes nothing of the pool's settings."""
            template = self.work_pool.base_job_template if self._has_successfully_synced else None
            if template is None or (template == self._template and self._spare.waits) or template == self._refused:
                return
            self._template = template
            make: Any = ProcessJobConfiguration.from_template_and_values  # its decorator hides its type
            try:
                configuration: ProcessJobConfiguration = await make(template, {}, client=self.client)
            except ValueError as error:  # one that every run has to complete
                logger.info("no process is kept ready: %s", error)
                self._refused = template
                return
            configuration.prepare_for_flow_run(FlowRun(flow_id=uuid4()), work_pool=self.work_pool)
            settings = get_current_settings().to_environment_variables(exclude_unset=True)
            environment = sanitize_subprocess_env({**os.environ, **configuration.env, **settings})
            command = command_from_string(configuration.command or "")
            await self._spare.keep(Start.of(command, environment, configuration.stream_output))

        async def _submit_scheduled_flow_runs(self, flow_run_response: "list[WorkerFlowRunResponse]") -> list[FlowRun]:
            ending = self._limiter.statistics().borrowers if self._limiter is not None else ()
            return await super()._submit_scheduled_flow_runs([entry for entry in flow_run_response if entry.flow_run.id not in ending])
