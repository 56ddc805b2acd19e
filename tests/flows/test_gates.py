"""Quality gates on the toy chain: where the chain stops, what it says, and how it goes on."""

import time
from typing import Any

import pytest

from schemas.errors import BadInput, GateNotMet
from tests.flows.conftest import ToyChain
from tests.flows.test_chain import pages_of

pytestmark = [pytest.mark.service, pytest.mark.usefixtures("prefect_server")]


def gated(chain: ToyChain, **bounds: float) -> dict[str, Any]:
    """The toy recipe; it selects two of the table's four lines."""
    return chain.data() | {"gates": {"enough": {"after": "select", "metric": "images", **bounds}}}


def test_a_gate_that_is_not_met_stops_the_chain_and_one_parameter_lets_it_go_on(chain: ToyChain) -> None:
    from flows.chain import distill_chain

    state = distill_chain(gated(chain, at_least=100), chain.address, return_state=True)
    assert state.is_failed() and chain.runs() == ["ingest", "measure", "select"]
    identity = chain.store.latest("toy", "select").identity
    said = "gate enough after select: images is 2, expected at least 100"
    assert said in state.message and "--pass-gate enough" in state.message
    tasks = tasks_of(state)
    assert tasks["gate enough"].state.is_failed() and tasks["gate enough"].run_count == 1, "a gate is not tried again"
    pages = pages_of(state)
    assert "not met" in pages["gate-enough"] and identity in pages["gate-enough"]
    assert "| select |" in pages["chain"] and "| encode |" not in pages["chain"]

    with pytest.raises(GateNotMet, match=said):  # found again: the stages are not run, the gate is looked at
        distill_chain(gated(chain, at_least=100), chain.address)
    assert chain.runs() == []
    identities = distill_chain(gated(chain, at_least=100), chain.address, pass_gates=["enough"])
    assert chain.runs() == ["teacher", "encode"] and identities["select"] == identity
    assert distill_chain(gated(chain, at_least=2, at_most=2), chain.address) == identities, "a gate is no part of identities"
    assert chain.runs() == []


def test_a_gate_that_cannot_be_looked_at_is_refused_before_any_work(chain: ToyChain) -> None:
    from flows.chain import distill_chain

    wrong = {"first": {"after": "moon", "metric": "images", "at_most": 1}, "second": {"after": "select", "metric": "beauty", "at_most": 1}}
    with pytest.raises(BadInput, match=r"gates\.first\.after: found 'moon'; expected one of ingest, measure, select") as refused:
        distill_chain(chain.data() | {"gates": wrong}, chain.address)
    assert "gates.second.metric: found 'beauty'; after select expected one of images_in, images" in str(refused.value)
    with pytest.raises(BadInput, match="--pass-gate other: is no gate of the recipe; expected one of enough"):
        distill_chain(gated(chain, at_least=1), chain.address, pass_gates=["other"])
    assert chain.runs() == []


def test_the_command_stops_at_a_gate_and_goes_on_past_it(chain: ToyChain, prefect_server: str) -> None:
    gate = ("--set", "gates={enough: {after: select, metric: images, at_least: 100}}")
    code, _, shown = chain.run("run", chain.recipe_file(), *gate, server=prefect_server)
    assert code == 1 and "Traceback" not in shown, shown
    assert "error: gate enough after select: images is 2, expected at least 100; to go on all the same: --pass-gate enough" in shown
    code, _, shown = chain.run("run", chain.recipe_file(), *gate, "--pass-gate", "enough", server=prefect_server)
    assert code == 0 and "it is passed all the same" in shown, shown
    assert chain.runs() == ["ingest", "measure", "select", "teacher", "encode"]


def test_a_stage_alone_fails_at_its_own_gates_only_and_keeps_its_artifact(chain: ToyChain) -> None:
    from flows.single import SINGLE_STAGES

    ingest, measure, select = (SINGLE_STAGES[name] for name in ("ingest", "measure", "select"))
    gates = gated(chain, at_least=100)
    gates["gates"]["later"] = {"after": "moon", "metric": "beauty", "at_most": 1}
    ingest(gates, chain.address)
    measure(gates, chain.address)
    state = select(gates, chain.address, return_state=True)
    assert state.is_failed() and "gate enough after select: images is 2, expected at least 100" in state.message
    assert tasks_of(state)["gate enough"].state.is_failed()
    made = chain.store.latest("toy", "select").identity
    assert {"select-result", "gate-enough"} <= set(pages_of(state))
    assert select(gates, chain.address, pass_gates=["enough"])["identity"] == made
    assert chain.runs() == ["ingest", "measure", "select"], "the artifact that did not pass was kept"
    with pytest.raises(BadInput, match=r"gates\.enough\.metric: found 'beauty'"):
        select(chain.data() | {"gates": {"enough": {"after": "select", "metric": "beauty", "at_most": 1}}}, chain.address)


def test_the_command_for_one_stage_fails_at_its_gate_and_can_be_told_not_to(chain: ToyChain, prefect_server: str) -> None:
    gate = ("--set", "gates={enough: {after: select, metric: images, at_least: 100}}")
    for name in ("ingest", "measure"):
        assert chain.run("stage", name, chain.recipe_file(), *gate)[0] == 0
    code, output, shown = chain.run("stage", "select", chain.recipe_file(), *gate)
    assert code == 1 and "Traceback" not in shown, shown
    assert "error: gate enough after select: images is 2, expected at least 100; to go on all the same: --pass-gate enough" in shown
    assert chain.store.latest("toy", "select").identity[:12] in output, "what was made is told"
    code, _, shown = chain.run("stage", "select", chain.recipe_file(), *gate, "--pass-gate", "enough")
    assert code == 0 and "it is passed all the same" in shown, shown
    code, _, shown = chain.run("stage", "select", chain.recipe_file(), "--pass-gate", "enough")
    assert code == 2 and "--pass-gate enough: is no gate of the recipe" in shown


def tasks_of(state: Any) -> dict[str, Any]:
    """Task runs by name, once the gate's has arrived at the server."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    filter_ = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        for _ in range(3000):  # events travel on their own, and slowly where the machine is busy
            found = {run.name: run for run in client.read_task_runs(flow_run_filter=filter_)}
            if "gate enough" in found and found["gate enough"].state.is_final():
                return found
            time.sleep(0.1)
    pytest.fail(f"found only {list(found)}")
