"""Deployments and work pools as `distill deploy` and `prefect.yaml` make them."""

from typing import Any

import pytest
import yaml

from schemas.errors import BadInput
from stages.registry import STAGES
from tests.flows.conftest import ROOT


def test_prefect_yaml_says_what_deploy_does() -> None:
    from prefect.flows import load_flow_from_entrypoint

    from flows.deployments import deployments

    made = {
        (item.name, item.entrypoint, item.work_pool_name, tuple(item.tags or ())): item.flow_name for item in deployments(["cpu", "gpu"])
    }
    declared = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert {(item["name"], item["entrypoint"], item["work_pool"]["name"], tuple(item["tags"])) for item in declared} == set(made)
    assert len(declared) == len(made) == 2 + 2 * len(STAGES)
    for (_, entrypoint, _, _), name in made.items():
        assert load_flow_from_entrypoint(str(entrypoint)).name == name


def test_deployments_carry_form_description_and_revision() -> None:
    from flows.deployments import deployments
    from infra.provenance import source_revision

    for item in deployments(["cpu", "gpu"]):
        assert item.version == source_revision()
        assert item.description and len(item.description) > 40
        assert "Recipe" in item._parameter_openapi_schema.definitions


def test_chains_are_in_the_parents_pool_alone() -> None:
    from flows.deployments import deployments

    assert {item.work_pool_name for item in deployments(["gpu", "cpu"]) if "chain" in (item.tags or ())} == {"cpu"}
    assert {item.work_pool_name for item in deployments(["cluster"]) if "chain" in (item.tags or ())} == {"cluster"}


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
