"""Offer every flow to a Prefect server from this machine: started, scheduled and watched in its UI, run here, one process a run."""

from prefect import serve

from flows.deployments import FLOWS, make_deployment


def serve_flows(limit: int = 1) -> None:
    """Register a deployment `here` of each flow with the configured server, and run what it schedules until interrupted.

    `limit` runs go at a time: stages that train want a device to themselves.
    """
    serve(*(make_deployment(flow, "here") for flow in FLOWS), limit=limit)
