"""A run whose process gets SIGTERM: a checkpoint, a run that waits for the next worker, and the same bytes in the end."""

import signal
import subprocess
import time
from typing import Any

import pytest

from tests.flows.conftest import COMMAND, ENGINE, ToyChain, wait_until

pytestmark = pytest.mark.service


def engine(chain: ToyChain, run: Any, server: str, **environment: str) -> "subprocess.Popen[str]":
    """Start the process that a worker starts for a run."""
    return chain.command(server=server, code=ENGINE, PREFECT__FLOW_RUN_ID=str(run.id), **environment)


@pytest.mark.slow
def test_a_preempted_run_goes_on_with_the_next_worker_and_ends_with_the_same_bytes(chain: ToyChain, prefect_server: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.states import Pending

    from flows.chain import distill_chain
    from flows.deployments import make_deployment
    from flows.pools import Pool, create_pool
    from flows.preparation import prepare
    from stages.runner import execute

    client: Any = get_client(sync_client=True)
    create_pool(client, Pool("taken-away"))
    deployment = make_deployment(distill_chain, "taken-away", "taken-away").apply()
    parameters = {"recipe": chain.data(), "store": chain.address}
    run = client.create_flow_run_from_deployment(deployment, parameters=parameters)

    first = engine(chain, run, prefect_server, TOY_SECONDS="0.3")
    end = time.monotonic() + 600
    while not (chain.folder / "encode.step").exists():
        assert first.poll() is None and time.monotonic() < end, first.communicate()
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    shown = first.communicate(timeout=300)
    assert first.returncode == 0, shown
    state = client.read_flow_run(run.id).state
    assert (state.name, state.type.value) == ("AwaitingRetry", "SCHEDULED"), (state, shown)
    assert "told to end (SIGTERM)" in state.message
    assert chain.runs() == ["ingest", "measure", "select", "teacher", "encode"]
    identity = prepare(chain.recipe(), chain.address).plan.identities["encode"]
    (checkpoint,) = chain.store.parts(identity)

    client.set_flow_run_state(run.id, Pending(), force=True)  # as a worker does that takes it up
    second = engine(chain, run, prefect_server)
    shown = second.communicate(timeout=600)
    again = client.read_flow_run(run.id)
    assert again.state.is_completed() and again.run_count == 2, shown
    assert chain.runs() == ["encode"]
    assert (chain.folder / "encode.start").read_text() == str(int(checkpoint.name.rpartition("-")[2]))

    here = prepare(chain.recipe(), f"file://{chain.folder / 'here'}")
    for node in here.plan.nodes:
        undisturbed = execute(here.plan, node, here.surroundings)
    made = chain.store.find(identity)
    assert made is not None and (made.identity, made.files_digest) == (undisturbed.identity, undisturbed.files_digest)
    assert (made.lineage.cost.attempts, undisturbed.lineage.cost.attempts) == (2, 1), "the first attempt is part of what it cost"


@pytest.mark.slow
def test_a_worker_that_a_script_started_in_the_background_ends_when_told(chain: ToyChain, prefect_server: str) -> None:
    """Shells have such a process ignore SIGINT, which is what Prefect's worker makes of SIGTERM."""
    from prefect.client.orchestration import get_client

    from flows.pools import Pool, create_pool

    client: Any = get_client(sync_client=True)
    create_pool(client, Pool("background"))
    ignoring = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {COMMAND}"
    with (chain.folder / "worker.log").open("w") as log:
        worker = chain.command("worker", "background", server=prefect_server, output=log, code=ignoring)
        try:
            wait_until(lambda: worker.poll() is not None or client.read_workers_for_work_pool("background"), "the start of the worker")
            worker.terminate()
            worker.wait(timeout=120)
        finally:
            worker.kill()
            worker.wait()
    assert "process worker" in (chain.folder / "worker.log").read_text()
