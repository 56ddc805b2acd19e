"""Failures and alarms, told to a webhook by automations of a real server; and scheduled runs that would overlap."""

import json
import logging
import queue
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from infra.demo.server import in_background
from tests.flows.conftest import ToyChain

pytestmark = [pytest.mark.service, pytest.mark.usefixtures("prefect_server")]

PATIENCE_SECONDS = 300


@pytest.fixture
def receiver() -> Iterator[tuple[str, "queue.Queue[dict[str, Any]]"]]:
    """Address of a web server, and the JSON that is posted there."""
    received: queue.Queue[dict[str, Any]] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    with in_background(server):
        yield f"http://127.0.0.1:{server.server_address[1]}/hook", received


def test_a_failure_and_an_alarm_are_posted_to_the_webhook(chain: ToyChain, receiver: tuple[str, "queue.Queue[dict[str, Any]]"]) -> None:
    from prefect import flow, tags
    from prefect.client.orchestration import get_client

    from flows.chain import distill_chain
    from flows.notifications import ALARMS, FAILURES, alarms_are_events, notify

    url, received = receiver
    client = get_client(sync_client=True)
    for _ in range(2):  # the second time they are brought up to date
        notify(client, url)
    assert [len(client.read_automations_by_name(name)) for name in (FAILURES, ALARMS)] == [1, 1]

    chain.fail("measure", "RunFailed")
    with tags("distill"):
        distill_chain(chain.recipe(), chain.address, return_state=True)
    failure = received.get(timeout=PATIENCE_SECONDS)["text"]
    assert failure.startswith("toy: Failed: ") and "measure was told to" in failure

    @flow(name="trains")
    def trains() -> None:
        logger = logging.getLogger("stages.training.anchors")
        logger.warning("not an alarm")
        with alarms_are_events():
            logger.warning('step 7, alarm latent_std: "0.2"', extra={"alarm": "latent_std"})

    trains()
    assert received.get(timeout=PATIENCE_SECONDS)["text"].endswith(': step 7, alarm latent_std: "0.2"')
    assert received.empty()


def test_a_run_that_would_overlap_is_cancelled_or_waits(chain: ToyChain) -> None:
    from prefect.client.orchestration import get_client
    from prefect.states import Pending

    from flows.deployments import scheduled_chain
    from flows.pools import Pool, create_pool
    from schemas.loading import parse_recipe

    client: Any = get_client(sync_client=True)
    create_pool(client, Pool("cpu"))
    for overlap, expected in {"skip": "Cancelled", "wait": "AwaitingConcurrencySlot"}.items():
        recipe = parse_recipe(chain.data() | {"name": f"often-{overlap}", "schedule": {"every_hours": 6, "overlap": overlap}})
        deployment = scheduled_chain(recipe, ["cpu"]).apply()
        found = client.read_deployment(deployment)
        assert found.schedules[0].active and found.schedules[0].schedule.interval.total_seconds() == 6 * 3600
        first, second = (client.create_flow_run_from_deployment(deployment) for _ in range(2))
        assert first.parameters["recipe"]["name"] == f"often-{overlap}"
        states = [client.set_flow_run_state(run.id, Pending()).state.name for run in (first, second)]
        assert states == ["Pending", expected]
