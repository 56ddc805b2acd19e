"""The chain as a Prefect flow, on a real server: what runs, what is found, what is retried, what people see."""

import json
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import BadInput, CorruptArtifact, RunFailed, Transient
from schemas.manifest import Manifest
from tests.flows.conftest import ToyChain

pytestmark = [pytest.mark.service, pytest.mark.usefixtures("prefect_server")]
ALL = ["ingest", "measure", "select", "teacher", "encode"]


def run(chain: ToyChain, **changes: dict[str, Any]) -> dict[str, str]:
    from flows.chain import distill_chain

    return distill_chain(chain.recipe(**changes), chain.address)


def run_state(chain: ToyChain) -> Any:
    from flows.chain import distill_chain

    return distill_chain(chain.recipe(), chain.address, return_state=True)


def tasks_of(state: Any, count: int = len(ALL)) -> list[Any]:
    """Task runs of a flow run as the server knows them, in order. Events travel on their own: wait until all have arrived."""
    import time

    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    with get_client(sync_client=True) as client:
        for _ in range(100):
            filter_ = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
            runs = client.read_task_runs(flow_run_filter=filter_)
            if len(runs) == count and all(run.state is not None and run.state.is_final() for run in runs):
                break
            time.sleep(0.1)
    return sorted(runs, key=lambda run: run.expected_start_time)


def test_the_chain_runs_and_then_everything_is_cached(chain: ToyChain) -> None:
    first = run(chain)
    assert chain.runs() == ALL
    assert set(first) == set(ALL)
    assert all(chain.store.verify(chain.store.resolve(identity)) == [] for identity in first.values())
    state = run_state(chain)
    assert chain.runs() == []
    runs = tasks_of(state)
    assert [(item.name, item.state.name) for item in runs] == [(name, "Cached") for name in ALL]
    assert sorted(path.name for path in (chain.folder / "store" / "prefect-results").iterdir()) == sorted(first.values())


def test_a_task_result_is_the_manifest_as_json(chain: ToyChain) -> None:
    identities = run(chain)
    for identity in identities.values():
        record = json.loads((chain.folder / "store" / "prefect-results" / identity).read_text())
        assert record["metadata"]["serializer"]["type"] == "json"
        kept = json.loads(record["result"])
        assert type(kept) is dict
        assert Manifest.model_validate(kept) == chain.store.find(identity)


def test_a_changed_field_reruns_only_what_follows(chain: ToyChain) -> None:
    before = run(chain)
    chain.runs()
    after = run(chain, select={"min_sharpness": 0.5})
    assert chain.runs() == ["select", "encode"]
    assert {name for name in ALL if before[name] != after[name]} == {"select", "encode"}
    run(chain, encode={"batch_size": 3})
    assert chain.runs() == ["encode"]
    run(chain, ingest={"threads": 3}, measure={"processes": 1})  # where and how fast, not what
    assert chain.runs() == []
    (chain.folder / "table.csv").write_text("url\nhttp://b/1.png")
    run(chain)
    assert chain.runs() == ["ingest", "measure", "select", "encode"]


def test_a_cache_hit_is_verified_against_the_store(chain: ToyChain) -> None:
    identities = run(chain)
    chain.runs()
    lost = next(path for path in (chain.folder / "store" / "artifacts" / identities["select"] / "files").rglob("rows.txt"))
    lost.unlink()
    assert run(chain) == identities
    assert chain.runs() == ["select"]
    assert lost.exists()
    chain.store.remove(identities["teacher"])
    assert run(chain) == identities
    assert chain.runs() == ["teacher"]


@pytest.mark.parametrize("damage", ["truncated", "another class", "another artifact"])
def test_a_damaged_result_record_is_read_anew(chain: ToyChain, damage: str) -> None:
    identities = run(chain)
    chain.runs()
    record = chain.folder / "store" / "prefect-results" / identities["select"]
    kept = json.loads(record.read_text())
    if damage == "truncated":
        record.write_text(record.read_text()[:40])
    elif damage == "another class":
        record.write_text(json.dumps(kept | {"result": json.dumps({"no": "manifest"})}))
    else:
        record.write_text((record.parent / identities["teacher"]).read_text())
    assert run(chain) == identities
    assert chain.runs() == []  # the artifact is there: its stage has nothing to do
    assert json.loads(json.loads(record.read_text())["result"])["identity"] == identities["select"]


def test_artifacts_made_without_prefect_are_found(chain: ToyChain) -> None:
    from flows.preparation import prepare
    from stages.runner import execute

    prepared = prepare(chain.recipe(), chain.address)
    for node in prepared.plan.nodes:
        execute(prepared.plan, node, prepared.surroundings)
    assert chain.runs() == ALL
    assert run(chain) == dict(prepared.plan.identities)
    assert chain.runs() == []


@pytest.mark.parametrize(
    ("times", "raised", "bodies"),
    [(2, None, 3), (9, Transient, 4), (9, BadInput, 1), (9, RunFailed, 1), (9, ZeroDivisionError, 1)],
)
def test_only_what_may_pass_is_retried(
    chain: ToyChain, monkeypatch: pytest.MonkeyPatch, times: int, raised: type[Exception] | None, bodies: int
) -> None:
    from flows.tasks import RETRIED

    monkeypatch.setitem(RETRIED, "retry_delay_seconds", [0.01, 0.02, 0.02])
    chain.fail("select", (raised or Transient).__name__, times)
    if raised is None:
        run(chain)
    else:
        with pytest.raises(raised, match="select was told to"):
            run(chain)
    assert chain.runs().count("select") == bodies


def test_waits_between_tries_grow() -> None:
    from flows.tasks import RETRY_DELAYS_SECONDS

    assert list(RETRY_DELAYS_SECONDS) == sorted(RETRY_DELAYS_SECONDS) and RETRY_DELAYS_SECONDS[0] >= 1


def test_a_failed_chain_goes_on_where_it_failed(chain: ToyChain) -> None:
    chain.fail("encode", "RunFailed")
    state = run_state(chain)
    assert state.is_failed() and "encode was told to" in state.message
    assert chain.runs() == ALL
    reason = pages_of(state)["encode-failure"]
    assert "encode was told to" in reason and f"distill stage encode RECIPE --store {chain.address}" in reason
    run(chain)
    assert chain.runs() == ["encode"]


def pages_of(state: Any) -> dict[str, str]:
    """Markdown pages of a flow run by key."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    filter_ = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        return {str(item.key): str(item.data) for item in client.read_artifacts(artifact_filter=filter_) if item.type == "markdown"}


def test_a_chain_can_end_with_an_earlier_stage(chain: ToyChain) -> None:
    from flows.chain import distill_chain

    assert set(distill_chain(chain.recipe(), chain.address, until="select")) == {"ingest", "measure", "select"}
    assert chain.runs() == ["ingest", "measure", "select"]
    with pytest.raises(BadInput, match="stage 'moon': is not in this recipe"):
        distill_chain(chain.recipe(), chain.address, until="moon")


def test_bad_input_is_refused_before_any_stage_runs(chain: ToyChain) -> None:
    (chain.folder / "table.csv").write_text("address\nhttp://a/1.png")
    with pytest.raises(BadInput, match="has no column url"):
        run(chain)
    assert chain.runs() == []


def test_pages_and_names_are_for_people(chain: ToyChain) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    state = run_state(chain)
    flow_run_id = state.state_details.flow_run_id
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(flow_run_id).name == "toy"
        artifacts = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id])))
    by_type = {kind: [item for item in artifacts if item.type == kind] for kind in ("markdown", "progress")}
    assert {item.key for item in by_type["markdown"]} == {*ALL, "chain"}
    (progress,) = by_type["progress"]
    assert progress.data == 100.0 and progress.description == "encode: 20/20 steps, loss 0.05"
    page = next(item.data for item in by_type["markdown"] if item.key == "encode")
    assert "latents" in page and chain.address in page


def test_what_stages_log_is_on_the_page_of_their_task(chain: ToyChain) -> None:
    import time

    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    state = run_state(chain)
    encode = next(item for item in tasks_of(state) if item.name == "encode")
    filter_ = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        for _ in range(100):  # sent in batches, every two seconds
            lines = [log.message for log in client.read_logs(log_filter=filter_) if log.task_run_id == encode.id]
            if any(line.startswith("encode: started") for line in lines):
                return
            time.sleep(0.1)
    pytest.fail(f"found only {lines}")


def test_names_of_links_show_what_learns_from_what() -> None:
    from flows.tasks import title
    from schemas.data import SelectConfig
    from stages.plan import Node

    assert title(Node("lightning-8-4", "lightning", SelectConfig(), 0)) == "lightning 8→4"
    assert title(Node("lightning-128-32-unet", "lightning", SelectConfig(), 0)) == "lightning 128→32 unet"
    assert title(Node("train-teacher", "train-teacher", SelectConfig(), 0)) == "train-teacher"


def test_the_body_runs_in_the_main_thread(chain: ToyChain, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from tests.flows.toy import select

    threads: list[bool] = []
    monkeypatch.setattr(select, "note_run", lambda _: threads.append(threading.current_thread() is threading.main_thread()))
    run(chain)
    assert threads == [True]


def test_the_smoke_flow_reads_every_byte_again(chain: ToyChain) -> None:
    from flows.smoke import distill_smoke

    identities = distill_smoke(chain.recipe_file(), chain.address)
    file = next(path for path in (chain.folder / "store" / "artifacts" / identities["select"]).rglob("rows.txt"))
    data = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptArtifact, match=r"select: rows\.txt"):
        distill_smoke(chain.recipe_file(), chain.address)


def test_results_on_object_storage(chain: ToyChain, seaweedfs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.chain import distill_chain

    for name, value in seaweedfs.environment.items():
        monkeypatch.setenv(name, value)
    address = f"s3://{seaweedfs.bucket}/{Path(chain.folder).name}"
    first = distill_chain(chain.recipe(), address)
    assert chain.runs() == ALL
    state = distill_chain(chain.recipe(), address, return_state=True)
    assert chain.runs() == []
    assert state.result() == first
    assert {item.state.name for item in tasks_of(state)} == {"Cached"}
