"""The job that a Kubernetes pool asks a cluster for, held against the fields and types that the API (batch/v1) has for them."""

import re
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic.alias_generators import to_camel

from tests.flows.conftest import ROOT
from tests.images.dockerfile import Dockerfile

Quantity = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?(m|[kMGTPE]i?)?$")] | Annotated[int, Field(ge=0)]
Label = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]


class Fields(BaseModel):
    """Fields by the names that the API has; one that it does not have is refused, as a cluster with strict validation does."""

    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class Capabilities(Fields):
    drop: list[str]


class ContainerSecurity(Fields):
    allow_privilege_escalation: bool
    capabilities: Capabilities


class Resources(Fields):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class SecretReference(Fields):
    name: Label
    optional: bool = False


class EnvFrom(Fields):
    secret_ref: SecretReference


class Mount(Fields):
    name: Label
    mount_path: Annotated[str, StringConstraints(pattern="^/")]


class Container(Fields):
    name: Label
    image: str
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"]
    args: list[str]
    env: dict[str, str]
    """The worker turns it into the API's list of names and values."""
    env_from: list[EnvFrom]
    security_context: ContainerSecurity
    resources: Resources
    volume_mounts: list[Mount]


class EmptyDir(Fields):
    medium: Literal["", "Memory"]


class Volume(Fields):
    name: Label
    empty_dir: EmptyDir


class Profile(Fields):
    type: Literal["RuntimeDefault", "Localhost", "Unconfined"]


class PodSecurity(Fields):
    run_as_non_root: bool
    run_as_user: int
    run_as_group: int
    fs_group: int
    seccomp_profile: Profile


class Toleration(Fields):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class PodSpec(Fields):
    restart_policy: Literal["Never", "OnFailure"]
    """Those of a job."""
    service_account_name: Label | None = None
    automount_service_account_token: bool
    termination_grace_period_seconds: Annotated[int, Field(ge=0)]
    node_selector: dict[str, str]
    tolerations: list[Toleration]
    security_context: PodSecurity
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume]


class PodTemplate(Fields):
    spec: PodSpec


class JobSpec(Fields):
    backoff_limit: Annotated[int, Field(ge=0)]
    ttl_seconds_after_finished: Annotated[int, Field(ge=0)]
    template: PodTemplate


class Metadata(Fields):
    generate_name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,56}-$")]
    namespace: Label
    labels: dict[str, str]


class Job(Fields):
    api_version: Literal["batch/v1"]
    kind: Literal["Job"]
    metadata: Metadata
    spec: JobSpec


def job(pool: str, **values: Any) -> dict[str, Any]:
    """What a worker makes of the pool's template, but for the environment's form."""
    from prefect.utilities.templating import apply_values

    from flows.pools import Pool

    _, template = Pool.parse(pool).definition()
    fields = template["variables"]["properties"]
    defaults = {name: field["default"] for name, field in fields.items() if "default" in field}
    given = {"name": "a-run", "labels": {"prefect.io/flow-run-id": "x"}, "command": ["prefect", "flow-run", "execute"]}
    made: dict[str, Any] = apply_values(template["job_configuration"], defaults | given | values)["job_manifest"]
    return made


@pytest.mark.parametrize(("pool", "gpus"), [("cpu=kubernetes", 0), ("gpu=kubernetes:cuda", 1)])
def test_a_job_is_one_that_the_api_takes(pool: str, gpus: int) -> None:
    made = Job.model_validate(job(pool))
    pod = made.spec.template.spec
    (container,) = pod.containers
    assert (
        container.resources.requests["nvidia.com/gpu"] == container.resources.limits["nvidia.com/gpu"] == gpus
    )  # the API wants them equal
    assert container.resources.limits["memory"] == container.resources.requests["memory"]
    assert container.image == f"diffusion-distillery:{'cuda' if gpus else 'cpu'}"
    assert {mount.name for mount in container.volume_mounts} == {volume.name for volume in pod.volumes}
    assert pod.restart_policy == "Never" and made.spec.backoff_limit == 0, "the cluster would start a run again beside Prefect"
    assert pod.termination_grace_period_seconds >= 300
    assert container.env_from[0].secret_ref.name == "distill"
    assert not any(re.search("KEY|SECRET|TOKEN|PASSWORD|AUTH", name) for name in container.env), "credentials are the secret's"


def test_a_job_runs_as_the_images_user() -> None:
    security = Job.model_validate(job("a=kubernetes")).spec.template.spec.security_context
    images = Dockerfile.read(ROOT / "docker" / "Dockerfile")
    for target in ("cpu", "cuda"):
        assert images.last(target, "USER") == f"{security.run_as_user}:{security.run_as_group}"
    assert security.run_as_non_root


def test_what_a_pool_can_be_told_reaches_the_job() -> None:
    values = {"gpus": 8, "memory": "900Gi", "node_selector": {"pool": "h100"}, "grace_seconds": 900, "service_account_name": "trainer"}
    pod = Job.model_validate(job("a=kubernetes:cuda", **values)).spec.template.spec
    assert pod.containers[0].resources.limits == {"memory": "900Gi", "nvidia.com/gpu": 8}
    assert (pod.node_selector, pod.termination_grace_period_seconds, pod.service_account_name) == ({"pool": "h100"}, 900, "trainer")


def test_a_wrong_job_is_found() -> None:
    made = job("a=kubernetes")
    made["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(ValidationError, match="Extra inputs"):
        Job.model_validate(made)
