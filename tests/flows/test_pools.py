"""The toy chain on two work pools: a real server, a process worker for each, stages that fail, are retried, joined and cancelled."""

import logging
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from schemas.errors import BadInput
from tests.flows.conftest import ENGINE, PATIENCE_SECONDS, ToyChain, wait_until

pytestmark = pytest.mark.service

ALL = ["ingest", "measure", "select", "teacher", "encode"]


@contextmanager
def worker(chain: ToyChain, pool: str, server: str) -> Iterator[None]:
    with (chain.folder / f"{pool}.log").open("w") as log:
        process = chain.command("worker", pool, "--limit", "2", server=server, output=log)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def client(prefect_server: str) -> Any:
    from prefect.client.orchestration import get_client

    return get_client(sync_client=True)


@pytest.fixture
def pools(chain: ToyChain, prefect_server: str, client: Any) -> Iterator[None]:
    """Both pools with all deployments, and a worker for each that runs the toys."""
    from prefect.client.schemas.actions import WorkPoolUpdate

    from flows.deployments import deploy
    from flows.pools import Pool, create_pool

    names = deploy([Pool("cpu"), Pool("gpu")], {"gpu": 1})
    create_pool(client, Pool("gpu"), 2)  # again, to the one that is there already
    assert client.read_work_pool("gpu").concurrency_limit == 2
    (watch,) = client.read_automations_by_name("distill: runs of lost workers")
    assert watch.trigger.within.total_seconds() == 120
    assert {"distill-chain/cpu", "distill-encode/gpu"} <= set(names) and "distill-chain/gpu" not in names
    for name in ("cpu", "gpu"):
        template = client.read_work_pool(name).base_job_template
        template["variables"]["properties"]["command"]["default"] = f'python -c "{ENGINE}"'
        client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))
    with worker(chain, "cpu", prefect_server), worker(chain, "gpu", prefect_server):
        yield


def start_chain(chain: ToyChain, client: Any, data: dict[str, Any]) -> Any:
    deployment = client.read_deployment_by_name("distill-chain/cpu")
    return client.create_flow_run_from_deployment(deployment.id, parameters={"recipe": data, "store": chain.address})


def ended(client: Any, run: Any, times: int = 1) -> Callable[[], Any]:
    def look() -> Any:
        found = client.read_flow_run(run.id)
        return found if found.state.is_final() and found.run_count >= times else None

    return look


def runs_on_gpu(client: Any) -> list[Any]:
    """Runs of encode's own deployment, oldest first."""
    from prefect.client.schemas.filters import WorkPoolFilter, WorkPoolFilterName

    found = client.read_flow_runs(work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=["gpu"])))
    return sorted(found, key=lambda run: run.created)


@pytest.mark.slow
@pytest.mark.usefixtures("pools")
def test_a_chain_whose_encoding_runs_on_another_pool(chain: ToyChain, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.states import AwaitingRetry, Cancelling

    from flows.chain import distill_chain
    from flows.preparation import prepare
    from stages.runner import execute

    data = chain.data() | {"pools": {"encode": "gpu", "teacher": "cpu"}}  # the chain's own pool: in its own process

    # A stage fails on its pool, and the chain with it; retried as the UI does it, the chain finds what is finished.
    chain.fail("encode", "RunFailed")
    run = start_chain(chain, client, data)
    failed = wait_until(ended(client, run), "the end of the failing chain")
    assert failed.state.is_failed() and "encode was told to" in failed.state.message
    assert chain.runs() == ALL
    client.set_flow_run_state(run.id, AwaitingRetry(), force=True)
    again = wait_until(ended(client, run, times=2), "the end of the retried chain")
    assert again.state.is_completed(), again.state.message
    assert chain.runs() == ["encode"]
    assert [item.state.name for item in runs_on_gpu(client)] == ["Failed", "Completed"]

    # The same bytes as in one process, without Prefect.
    here = prepare(chain.recipe(), f"file://{chain.folder / 'here'}")
    for node in here.plan.nodes:
        alone = execute(here.plan, node, here.surroundings)
        pooled = chain.store.resolve(here.plan.identities[node.name])
        assert (pooled.identity, pooled.files_digest) == (alone.identity, alone.files_digest)
    chain.runs()

    # Two chains ask for one artifact: it is made once. The one that began is cancelled, and its stage with it, which leaves a checkpoint;
    # the other, in this process, has it made to the end.
    data["encode"] = {"batch_size": 3}
    (chain.folder / "encode.seconds").write_text("1")
    (chain.folder / "encode.step").unlink()
    first = start_chain(chain, client, data)
    wait_until(lambda: "encode" in log(chain), "the start of encode")
    (stage,) = runs_on_gpu(client)[2:]

    joined = threading.Event()

    def cancel_when_joined() -> None:
        joined.wait(PATIENCE_SECONDS)
        wait_until((chain.folder / "encode.step").exists, "a step of the stage")
        client.set_flow_run_state(first.id, Cancelling())
        wait_until(ended(client, stage), "the end of the cancelled stage")
        (chain.folder / "encode.seconds").write_text("0")

    def hear(record: logging.LogRecord) -> bool:
        if "joins run" in record.getMessage():
            joined.set()
        return True

    monkeypatch.setattr(logging.getLogger("flows.routing"), "filters", [hear])
    canceller = threading.Thread(target=cancel_when_joined)
    canceller.start()
    identities = distill_chain(data, chain.address)
    canceller.join()
    assert wait_until(ended(client, first), "the end of the cancelled chain").state.is_cancelled()
    assert [item.state.name for item in runs_on_gpu(client)[2:]] == ["Cancelled", "Completed"]
    assert chain.runs() == ["encode", "encode"]
    assert int((chain.folder / "encode.start").read_text()) >= 1, "it went on from the checkpoint of the cancelled run"
    assert chain.store.verify(chain.store.resolve(identities["encode"])) == []


def log(chain: ToyChain) -> str:
    path = chain.folder / "runs.log"
    return path.read_text() if path.exists() else ""


def test_pools_that_are_not_there_are_refused_before_any_work(
    chain: ToyChain, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.chain import distill_chain

    data = chain.data() | {"pools": {"encode": "moon", "teacher": "moon"}}
    with pytest.raises(
        BadInput, match=r"pools\.teacher: found 'moon'; the Prefect server has no deployment distill-teacher/moon"
    ) as refused:
        distill_chain(data, chain.address)
    assert "pools.encode: found 'moon'" in str(refused.value)
    monkeypatch.chdir(chain.folder)
    with pytest.raises(BadInput, match=r"teacher\.source: found 'teacher'; the stage runs on the pool moon: expected an absolute path"):
        distill_chain(data | {"teacher": {"source": "teacher"}}, chain.address)
    assert chain.runs() == []


def test_a_stage_run_is_refused_where_it_would_make_another_artifact(chain: ToyChain, prefect_server: str) -> None:
    from flows.single import SINGLE_STAGES

    with pytest.raises(BadInput, match=r"ingest: would make the artifact .* another version of the code"):
        SINGLE_STAGES["ingest"](chain.recipe(), chain.address, identity="0" * 64)
    assert chain.runs() == []


def test_a_stage_alone_needs_nothing_of_what_it_does_not_read(chain: ToyChain, prefect_server: str) -> None:
    """A worker with GPUs need not reach the table of URLs."""
    from flows.preparation import prepare
    from flows.single import SINGLE_STAGES
    from stages.runner import execute

    whole = prepare(chain.recipe(), chain.address)
    for node in whole.plan.nodes[:-1]:
        execute(whole.plan, node, whole.surroundings)
    (chain.folder / "table.csv").unlink()
    (chain.folder / "teacher" / "weights.bin").unlink()
    given = {name: whole.plan.identities[name] for name in whole.plan.node("encode").upstream()}
    identity = whole.plan.identities["encode"]
    made = SINGLE_STAGES["encode"](chain.recipe(), chain.address, inputs=given, identity=identity)
    assert made["identity"] == identity
