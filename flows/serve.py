"""Offer every flow to a Prefect server from this machine: started, scheduled and watched in its UI, run here, one process a run."""

from typing import Any

from prefect import Flow, serve
from prefect.types.entrypoint import EntrypointType

from flows.chain import distill_chain
from flows.single import SINGLE_STAGES
from flows.smoke import distill_smoke

FLOWS: tuple[Flow[..., Any], ...] = (distill_chain, distill_smoke, *SINGLE_STAGES.values())


def serve_flows(limit: int = 1) -> None:
    """Register a deployment `here` of each flow with the configured server, and run what it schedules until interrupted.

    `limit` runs go at a time: stages that train want a device to themselves.
    """
    deployments = [
        # by module: a path would be relative to this folder, and the function found there is not the flow
        flow.to_deployment(name="here", description=flow.description, tags=["distill"], entrypoint_type=EntrypointType.MODULE_PATH)
        for flow in FLOWS
    ]
    serve(*deployments, limit=limit)  # type: ignore[arg-type]  # it takes what to_deployment gives
