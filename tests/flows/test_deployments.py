"""Deployments and work pools as `distill deploy` and `prefect.yaml` make them."""

import asyncio
import logging
from typing import Any
from uuid import uuid4

import httpx
import pytest
import yaml
from anyio import CapacityLimiter

from schemas.errors import BadInput
from stages.registry import STAGES
from tests.flows.conftest import ROOT


@pytest.fixture(scope="module")
def both() -> list[Any]:
    from flows.deployments import deployments

    return list(deployments(["gpu", "cpu"]))


def test_prefect_yaml_says_what_deploy_does(both: list[Any]) -> None:
    from prefect.flows import load_flow_from_entrypoint

    made = {(item.name, item.entrypoint, item.work_pool_name, tuple(item.tags or ())): item.flow_name for item in both}
    declared = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert {(item["name"], item["entrypoint"], item["work_pool"]["name"], tuple(item["tags"])) for item in declared} == set(made)
    assert len(declared) == len(made) == 2 + 2 * len(STAGES)
    for (_, entrypoint, _, _), name in made.items():
        assert load_flow_from_entrypoint(str(entrypoint)).name == name


def test_the_nightly_smoke_is_the_same_in_both_and_off_until_it_is_asked_for(both: list[Any]) -> None:
    from flows.deployments import deployments

    (declared,) = [item for item in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"] if item.get("schedules")]
    (made,) = [item for item in both if item.schedules]
    assert made.flow_name == "distill-smoke" and declared["entrypoint"].endswith("distill_smoke")
    ((wanted,), (found,)) = (declared["schedules"], made.schedules)
    assert (found.schedule.cron, found.schedule.timezone, found.active) == (wanted["cron"], wanted["timezone"], wanted["active"])
    assert not found.active
    assert (made.concurrency_limit, made.concurrency_options.collision_strategy) == tuple(declared["concurrency_limit"].values())
    asked = next(item for item in deployments(["cpu"], nightly=True) if item.schedules)
    assert asked.schedules[0].active


def scheduled(**schedule: Any) -> Any:
    from schemas.loading import parse_recipe

    sections = {"name": "refresh", "ingest": {"table": "s3://bucket/urls.parquet"}, "teacher": {"source": "/models/teacher"}}
    return parse_recipe(sections | {"schedule": schedule})


def test_a_recipe_with_a_schedule_is_a_deployment_of_its_own() -> None:
    from datetime import timedelta

    from flows.deployments import scheduled_chain

    made = scheduled_chain(scheduled(cron="0 2 * * *", timezone="Europe/Berlin", until="encode"), ["gpu", "cpu"])
    assert (made.full_name, made.work_pool_name) == ("distill-chain/refresh", "cpu")
    assert (made.schedules[0].schedule.cron, made.schedules[0].schedule.timezone) == ("0 2 * * *", "Europe/Berlin")
    assert made.schedules[0].active
    assert (made.concurrency_limit, str(made.concurrency_options.collision_strategy.value)) == (1, "CANCEL_NEW")
    assert made.parameters["until"] == "encode" and made.parameters["recipe"]["name"] == "refresh"
    waiting = scheduled_chain(scheduled(every_hours=6, overlap="wait"), ["cpu"])
    assert waiting.schedules[0].schedule.interval == timedelta(hours=6)
    assert str(waiting.concurrency_options.collision_strategy.value) == "ENQUEUE"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schedule": None}, "--schedule: the recipe refresh has none; expected a section"),
        ({"name": "cpu"}, "--schedule: the recipe's name cpu is that of a pool"),
        (
            {"ingest": {"table": "urls.parquet"}},
            r"ingest\.table: found 'urls.parquet'; the stage runs on the pool cpu: expected an absolute path",
        ),
        ({"schedule": {"every_hours": 6, "until": "moon"}}, "stage 'moon': is not in this recipe"),
        ({"gates": {"g": {"after": "moon", "metric": "images", "at_most": 1}}}, r"gates\.g\.after: found 'moon'"),
    ],
)
def test_a_recipe_that_cannot_run_by_itself_is_refused(change: dict[str, Any], expected: str) -> None:
    from flows.deployments import scheduled_chain
    from schemas.loading import parse_recipe

    recipe = parse_recipe(scheduled(every_hours=6).model_dump(mode="json") | change)
    with pytest.raises(BadInput, match=expected):
        scheduled_chain(recipe, ["cpu"])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({}, r"schedule\.cron: found None; expected exactly one of cron and every_hours"),
        ({"cron": "0 2 * * *", "every_hours": 1}, r"schedule\.cron: found '0 2 \* \* \*'; expected exactly one"),
        ({"cron": "nightly"}, r"schedule\.cron: found 'nightly'; expected five fields"),
        ({"cron": "0 2 * * *", "timezone": "Mars/Olympus"}, r"schedule\.timezone: found 'Mars/Olympus'; expected an IANA name"),
        ({"every_hours": 0}, r"schedule\.every_hours: found 0; expected"),
    ],
)
def test_a_wrong_schedule_is_refused_with_its_place(schedule: dict[str, Any], expected: str) -> None:
    with pytest.raises(BadInput, match=expected):
        scheduled(**schedule)


@pytest.mark.parametrize("url", ["", "hooks.example", "ftp://host/x", "https://"])
def test_a_wrong_address_to_notify_is_refused(url: str) -> None:
    from flows.notifications import check_address

    with pytest.raises(BadInput, match="expected the address of a webhook"):
        check_address(url)


def test_a_lost_worker_may_pass_and_a_failed_run_does_not() -> None:
    from prefect.client.schemas.objects import FlowRun
    from prefect.states import Cancelled, Completed, Crashed, Failed

    from flows.routing import _failure
    from schemas.data import SelectConfig
    from schemas.errors import RunFailed, Transient
    from stages.plan import Node

    node, run = Node("select", "select", SelectConfig(), 0), FlowRun(flow_id=uuid4())
    assert type(_failure(node, run, Crashed(message="its worker is lost"))) is Transient
    for state in (Failed(message="NaN"), Cancelled(), Completed()):
        assert type(_failure(node, run, state)) is RunFailed


def test_deployments_carry_form_description_and_revision(both: list[Any]) -> None:
    from infra.provenance import source_revision

    for item in both:
        assert item.version == source_revision()
        assert item.description and len(item.description) > 40
        assert "Recipe" in item._parameter_openapi_schema.definitions


def test_chains_are_in_the_parents_pool_alone(both: list[Any]) -> None:
    assert {item.work_pool_name for item in both if "chain" in (item.tags or ())} == {"cpu"}


@pytest.mark.parametrize("text", ["", "=process", "gpu=slurm", "gpu=process:tpu", "gpu=:cuda:", "gpu=../pools/process"])
def test_a_wrong_pool_is_refused(text: str) -> None:
    from flows.pools import Pool

    with pytest.raises(BadInput, match="expected NAME=TEMPLATE"):
        Pool.parse(text)


@pytest.mark.parametrize("text", ["gpu", "gpu=0", "gpu=many", "=3", "gpu=-1"])
def test_a_wrong_limit_is_refused(text: str) -> None:
    from flows.deployments import parse_limits

    with pytest.raises(BadInput, match="expected NAME=COUNT"):
        parse_limits([text])


def test_a_limit_of_no_pool_is_refused_before_anything_is_made() -> None:
    from flows.deployments import deploy
    from flows.pools import Pool

    with pytest.raises(BadInput, match="--limit training: is none of the pools cpu, gpu"):
        deploy([Pool("cpu"), Pool("gpu")], {"training": 1})


def test_gpu_pools_name_the_device() -> None:
    from flows.pools import Pool

    for text, device in {"gpu=process:cuda": "cuda", "cpu": None}.items():
        _, template = Pool.parse(text).definition()
        environment: dict[str, Any] = template["variables"]["properties"]["env"]["default"]
        assert environment.get("DISTILL_DEVICE") == device
        assert "stages" in environment["PREFECT_LOGGING_EXTRA_LOGGERS"]


def test_the_process_template_has_the_fields_of_prefects() -> None:
    from prefect.workers.process import ProcessWorker

    from flows.pools import Pool

    theirs, (_, ours) = ProcessWorker.get_default_base_job_template(), Pool("cpu").definition()
    assert ours["job_configuration"] == theirs["job_configuration"]
    assert set(ours["variables"]["properties"]) == set(theirs["variables"]["properties"])


@pytest.mark.parametrize("text", ["a=process", "a=process:cuda", "a=docker", "a=docker:cuda", "a=kubernetes", "a=kubernetes:cuda"])
def test_templates_are_valid_and_all_their_placeholders_have_a_variable(text: str) -> None:
    """No container engine or cluster is here: what can be told without one is that the server takes a template, and what a worker makes of it."""
    from prefect.utilities.schema_tools.validation import ValidationError, validate
    from prefect.utilities.templating import apply_values, find_placeholders

    from flows.pools import Pool

    kind, template = Pool.parse(text).definition()
    assert kind == text.partition("=")[2].partition(":")[0]
    configuration, schema = template["job_configuration"], template["variables"]
    fields = schema["properties"]
    assert {item.name for item in find_placeholders(configuration)} == set(fields)
    defaults = {name: field["default"] for name, field in fields.items() if "default" in field}
    validate(defaults, schema, raise_on_error=True)
    with pytest.raises(ValidationError, match="is not of type"):
        validate(defaults | {"env": 3}, schema, raise_on_error=True)
    assert all(field["title"] and field["description"] for field in fields.values())
    made = apply_values(configuration, defaults | {"name": "a-run", "labels": {"a": "b"}, "command": ["x"]})
    if kind == "kubernetes":
        (container,) = made["job_manifest"]["spec"]["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == (1 if "cuda" in text else 0)
        assert made["job_manifest"]["metadata"]["generateName"] == "a-run-"
        assert container["env"]["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"
    if kind == "docker":
        assert bool(made["container_create_kwargs"].get("device_requests")) == ("cuda" in text)
    assert (made["env"].get("DISTILL_DEVICE") == "cuda") == ("cuda" in text)


@pytest.mark.parametrize("seconds", [45, 120])
def test_lost_runs_are_started_again_and_cancelled_ones_are_not(seconds: int) -> None:
    from flows.lost_runs import TAG, automations

    found = {automation.name.removeprefix("distill: "): automation for automation in automations(seconds)}
    state = {name: automation.actions[0].name for name, automation in found.items()}
    assert state == {
        "runs of lost workers": "AwaitingRetry",
        "runs that do not begin": "AwaitingRetry",
        "cancelled runs of lost workers": "Cancelled",
    }
    triggers = {name: automation.trigger for name, automation in found.items()}
    assert [trigger.within.total_seconds() for trigger in triggers.values()] == [seconds, 5 * seconds, seconds]
    for trigger in triggers.values():
        assert {f"prefect.flow-run.{end}" for end in ("Completed", "Failed", "Cancelled", "Crashed")} <= trigger.expect
        assert trigger.match_related.root["prefect.resource.id"] == [f"prefect.tag.{TAG}"]
    assert "prefect.flow-run.Cancelling" in triggers["runs of lost workers"].expect & triggers["runs that do not begin"].expect


def test_a_worker_outlives_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.workers.process import ProcessWorker

    from flows.process_worker import PatientProcessWorker

    errors: list[Exception] = [answer(404), answer(500), httpx.ConnectError("refused"), httpx.ReadTimeout("late")]

    told: list[str] = []

    def hear(record: logging.LogRecord) -> bool:  # Prefect's settings may keep records from the root, where pytest listens
        told.append(record.getMessage())
        return True

    monkeypatch.setattr(logging.getLogger("flows.process_worker"), "filters", [hear])

    async def ask(_worker: ProcessWorker) -> None:
        raise errors.pop()

    monkeypatch.setattr(ProcessWorker, "get_and_submit_flow_runs", ask)
    monkeypatch.setattr(ProcessWorker, "sync_with_backend", ask)

    async def poll() -> None:
        worker = PatientProcessWorker("pool")
        worker._has_successfully_synced = True
        for _ in range(2):
            assert await worker.get_and_submit_flow_runs() == []
        await worker.sync_with_backend()
        with pytest.raises(httpx.HTTPStatusError):  # the pool is gone, not the server
            await worker.get_and_submit_flow_runs()

    asyncio.run(poll())
    assert len(told) == 1 and "does not answer (late)" in told[0]


def answer(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "http://127.0.0.1/api")
    return httpx.HTTPStatusError("refused", request=request, response=httpx.Response(status, request=request))


def test_a_worker_outlives_the_retry_of_a_run_whose_process_is_still_ending() -> None:
    from prefect.client.schemas.objects import FlowRun
    from prefect.client.schemas.responses import WorkerFlowRunResponse
    from prefect.utilities.dispatch import lookup_type
    from prefect.workers.base import BaseWorker

    from flows.process_worker import PatientProcessWorker

    assert lookup_type(BaseWorker, "process") is PatientProcessWorker, "what prefect worker start takes"

    async def retried() -> list[FlowRun]:
        worker, run = PatientProcessWorker("pool", limit=2), FlowRun(flow_id=uuid4())
        worker._limiter = CapacityLimiter(2)
        worker._limiter.acquire_on_behalf_of_nowait(run.id)
        return await worker._submit_scheduled_flow_runs([WorkerFlowRunResponse(work_pool_id=uuid4(), work_queue_id=uuid4(), flow_run=run)])

    assert asyncio.run(retried()) == []
