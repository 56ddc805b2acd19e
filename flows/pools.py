"""Work pools of Prefect, made from the templates of `infra/pools`."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound

import infra
from flows.environment import HEARTBEAT_SECONDS, ROOMS
from schemas.errors import BadInput

TEMPLATES: Final = Path(infra.__file__).parent / "pools"
PARENTS: Final = "cpu"
"""The pool of whole chains, which only wait while their stages run on other pools: these can be full without keeping a chain from going on."""
DEFAULT_POOLS: Final = ("cpu=process", "gpu=process:cuda")


@dataclass(frozen=True)
class Pool:
    """A work pool as the command line names it."""

    name: str
    template: str = "process"
    """Name of a file in `infra/pools`."""
    cuda: bool = False
    """Its workers have NVIDIA GPUs: stages that name no device use them, and fail at once where there is none."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `name`, `name=template` or `name=template:cuda`. Raises `BadInput`."""
        name, _, kind = text.partition("=")
        template, _, device = (kind or "process").partition(":")
        known = sorted(path.stem for path in TEMPLATES.glob("*.yaml"))
        if not name or template not in known or device not in ("", "cuda"):
            raise BadInput(f"--pool {text}: expected NAME=TEMPLATE or NAME=TEMPLATE:cuda, with one of the templates {', '.join(known)}")
        return cls(name, template, cuda=bool(device))

    def definition(self) -> tuple[str, dict[str, Any]]:
        """Return the type of the pool's workers, and its base job template."""
        content = yaml.safe_load((TEMPLATES / f"{self.template}.yaml").read_text(encoding="utf-8"))
        template: dict[str, Any] = deepcopy(content["base_job_template"])
        fields = template["variables"]["properties"]
        environment = {
            "PREFECT_LOGGING_EXTRA_LOGGERS": ",".join(ROOMS),
            "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        }
        if self.cuda:
            environment["DISTILL_DEVICE"] = "cuda"
            for name, value in content["cuda"].items():
                fields[name]["default"] = value
        fields["env"]["default"] = environment | fields["env"].get("default", {})
        return content["type"], template


def create_pool(client: SyncPrefectClient, pool: Pool, limit: int | None = None) -> None:
    """Make the pool, or bring the template of an existing one up to date. `limit`: runs at a time, None: as it is.

    Raises `BadInput` when a pool of that name has workers of another type.
    """
    kind, template = pool.definition()
    try:
        existing = client.read_work_pool(pool.name)
    except ObjectNotFound:
        client.create_work_pool(
            WorkPoolCreate(name=pool.name, type=kind, base_job_template=template, concurrency_limit=limit, description=_description(pool))
        )
        return
    if existing.type != kind:
        raise BadInput(f"--pool {pool.name}={pool.template}: a pool of that name is of the type {existing.type}; expected {existing.type}")
    update: dict[str, Any] = {"base_job_template": template} | ({} if limit is None else {"concurrency_limit": limit})
    client.update_work_pool(pool.name, WorkPoolUpdate(**update))


def _description(pool: Pool) -> str:
    device = "on NVIDIA GPUs" if pool.cuda else "on CPUs"
    return f"Stages of distillation {device}. Start a worker with: distill worker {pool.name}"
