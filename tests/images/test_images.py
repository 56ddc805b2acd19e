"""The images and the compose file, as far as can be told without an engine: everything they name is there, pinned, and says what the code says."""

import re
import shlex
import subprocess
import sys
import time
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import BaseModel, ConfigDict

from infra.seaweedfs import PORTS, ObjectStore, free_ports
from infra.settings import Settings
from infra.store import StoreSettings
from tests.flows.conftest import ROOT
from tests.images.dockerfile import Dockerfile, Ignored, copies

TARGETS = ("server", "store", "cpu", "cuda")
FOLDER = ROOT / "docker"
SECRETS = {"POSTGRES_PASSWORD", "PREFECT_AUTH_STRING", "STORE_ACCESS_KEY", "STORE_SECRET_KEY", "HF_TOKEN"}
REVISION = "DISTILL_SOURCE_REVISION"
FLAGS = ("-c", "-r", "--extra")
VARIABLE = re.compile(r"\$\{(\w+)(:?[-?][^}]*)?\}")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Condition(Strict):
    condition: Literal["service_healthy", "service_completed_successfully"]


class Build(Strict):
    context: str
    dockerfile: str
    target: str
    args: dict[str, str] = {}


class HealthCheck(Strict):
    test: list[str]
    interval: str
    timeout: str
    retries: int


class Device(Strict):
    driver: str
    count: Literal["all"]
    capabilities: list[str]


class Reservations(Strict):
    devices: list[Device]


class Resources(Strict):
    reservations: Reservations


class Placement(Strict):
    resources: Resources


class ComposeService(Strict):
    """The keys of the Compose Specification that we use, with the types that it gives them."""

    image: str
    build: Build | None = None
    command: list[str] | None = None
    environment: dict[str, str]
    networks: list[str]
    ports: list[str] = []
    volumes: list[str] = []
    healthcheck: HealthCheck | None = None
    depends_on: dict[str, Condition] = {}
    deploy: Placement | None = None
    profiles: list[str] = []
    restart: Literal["no", "unless-stopped"]
    init: bool = False
    cap_drop: list[str] = []
    security_opt: list[str]
    stop_grace_period: str | None = None
    shm_size: str | None = None


class Network(Strict):
    internal: bool = False


class Compose(Strict):
    name: str
    services: dict[str, ComposeService]
    networks: dict[str, Network]
    volumes: dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def images() -> Dockerfile:
    return Dockerfile.read(FOLDER / "Dockerfile")


@pytest.fixture(scope="module")
def compose() -> Compose:
    content = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
    return Compose.model_validate({key: value for key, value in content.items() if not key.startswith("x-")})


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def example() -> dict[str, str]:
    lines = (FOLDER / "example.env").read_text(encoding="utf-8").splitlines()
    return {name: value for name, _, value in (line.partition("=") for line in lines if line and not line.startswith("#"))}


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_nobody_in_particular_and_holds_no_build_tool(images: Dockerfile, target: str) -> None:
    assert images.last(target, "USER") == "10001:10001"
    runs = " ".join(rest for name, rest in images.image(target) if name == "RUN")
    assert "--uid 10001" in runs and "--gid 10001" in runs
    assert not re.search(r"\b(apt-get|apt|pip|uv|gcc|curl|git)\b", runs), "the last stage installs something"


def test_bases_are_slim_and_pinned(images: Dockerfile, compose: Compose) -> None:
    (base,) = images.bases()
    assert re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+", base)
    for service in compose.services.values():
        assert service.build or re.fullmatch(r"[a-z]+:\d+\.\d+-[a-z]+", service.image), f"{service.image} is not pinned"


def test_everything_installed_has_the_version_that_is_tested(images: Dockerfile) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    versions = {canonicalize_name(name): version for name, version in pins().items()}
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *(item for name in extras for item in extras[name])]:
        requirement = Requirement(text)
        if requirement.name != project["name"] and not requirement.name.startswith("types-"):
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), text
    installs = [rest for stage in images.stages.values() for rest in stage.all("RUN") if "pip install" in rest]
    assert len(installs) == 7
    for install in installs:
        words = shlex.split(re.sub(r"\$\{\w+:\+[^}]*\{\w+\}\}", "", install.partition("pip install")[2]))
        if words == ["--no-deps", "-e", "."]:
            continue
        assert words.count("-c") == 1 and words[words.index("-c") + 1] == "constraints.txt"
        for name in (word for before, word in pairwise(["", *words]) if not word.startswith("-") and before not in FLAGS):
            assert canonicalize_name(name) in versions, f"{name} is installed without a version"
        for extra in (word for before, word in pairwise(words) if before == "--extra"):
            assert extra in extras


def test_the_context_has_all_that_is_copied_and_nothing_else(images: Dockerfile, tmp_path: Path) -> None:
    ignored = Ignored(ROOT / ".dockerignore")
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    new = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--others", "--exclude-standard"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    context = {path for path in [*tracked, *new] if (ROOT / path).exists() and not ignored(path)}
    for stage in images.stages.values():
        for origin, sources, target in copies(stage):
            for source in sources:
                if origin is not None:
                    made = [rest for name, rest in images.image(origin) if name in ("RUN", "WORKDIR", "ENV")]
                    assert any(source in rest or source.startswith("/opt/venv") for rest in made), f"{source} of {origin} to {target}"
                elif source != ".":
                    assert source in context, f"{stage.name}: {source} is not in the context"
    rooms = {"flows", "infra", "schemas", "stages", "recipes"}
    assert {path for path in context if path.partition("/")[0] not in rooms} == {
        *("README.md", "LICENSE", "constraints.txt", "docker/healthy.py", "pyproject.toml"),
    }
    assert {path for path in tracked if path.partition("/")[0] in rooms} <= context
    kept_out = ["docker/.env", "flows/.env", "flows/__pycache__/chain.pyc", ".git/config", "store/x", "services/environment", ".venv/x"]
    assert all(ignored(path) for path in kept_out)


def test_every_variable_is_told_of_and_no_secret_has_a_default(compose: Compose) -> None:
    text = re.sub(r"(?m)^\s*#.*$", "", (FOLDER / "compose.yaml").read_text(encoding="utf-8"))
    used = VARIABLE.findall(text)
    assert {name for name, _ in used} == set(example())
    assert {name for name, value in example().items() if not value} == SECRETS | {"CUDA_TORCH_BACKEND"}
    for name, rest in used:
        if name in SECRETS - {"HF_TOKEN"}:
            assert not rest or rest.startswith(":?"), f"{name} has the default {rest}"
        elif rest.startswith((":-", "-")):
            assert example()[name] == rest.lstrip(":-"), f"{name}: the example says another default"
    for name, service in compose.services.items():
        for key, value in service.environment.items():
            if re.search(r"PASSWORD|SECRET|TOKEN|AUTH|ACCESS_KEY|CONNECTION", key):
                assert VARIABLE.search(value), f"{name}: {key} is written out"


def test_nothing_is_published_beyond_this_machine_unless_asked_for(compose: Compose) -> None:
    published = {name: service.ports for name, service in compose.services.items() if service.ports}
    assert set(published) == {"server", "store"}
    for (port,) in published.values():
        assert re.fullmatch(r"\$\{PUBLISH_ADDRESS:-127\.0\.0\.1\}:(\d+):\1", port)
    holders = {name for name, service in compose.services.items() if "AWS_SECRET_ACCESS_KEY" in service.environment}
    assert {name for name, service in compose.services.items() if "storage" in service.networks} == holders


def test_services_wait_for_what_they_need(compose: Compose, images: Dockerfile) -> None:
    for name, service in compose.services.items():
        assert set(service.networks) <= set(compose.networks)
        assert {volume.partition(":")[0] for volume in service.volumes} <= set(compose.volumes)
        for needed, condition in service.depends_on.items():
            other = compose.services[needed]
            if condition.condition == "service_healthy":
                assert other.healthcheck or (other.build and images.health_command(other.build.target)), f"{needed} cannot be healthy"
            else:
                assert other.restart == "no", f"{needed} is started again when it is done"
            assert set(service.networks) & set(other.networks) or name == "worker", f"{name} does not reach {needed}"
        for host in re.findall(r"(?:://|@)(\w+):\d+", " ".join(service.environment.values())):
            if host != "127":
                assert set(compose.services[host].networks) & set(service.networks), f"{name} does not reach {host}"
    gpu = compose.services["worker-gpu"]
    assert gpu.profiles == ["gpu"] and gpu.deploy and gpu.deploy.resources.reservations.devices[0].capabilities == ["gpu"]


def test_what_is_built_and_set_exists(compose: Compose, images: Dockerfile) -> None:
    from prefect.settings import Settings as PrefectSettings
    from prefect.settings.legacy import _get_valid_setting_names

    ours = {f"DISTILL_{name.upper()}" for name in Settings.model_fields} | {
        f"DISTILL_STORE_{name.upper()}" for name in StoreSettings.model_fields
    }
    names = {name for service in compose.services.values() for name in service.environment}
    names |= {item.partition("=")[0] for stage in images.stages.values() for rest in stage.all("ENV") for item in shlex.split(rest)}
    assert {name for name in names if name.startswith("DISTILL_")} <= ours | {REVISION}
    assert {name for name in names if name.startswith("PREFECT_")} <= _get_valid_setting_names(PrefectSettings)
    arguments = {rest.partition("=")[0] for stage in images.stages.values() for rest in stage.all("ARG")}
    for service in compose.services.values():
        assert "no-new-privileges:true" in service.security_opt
        if service.build:
            assert (FOLDER / service.build.context / service.build.dockerfile).is_file()
            assert service.image == f"diffusion-distillery:{images.stages[service.build.target].name}"
            assert set(service.build.args) <= arguments
            assert service.init and service.cap_drop == ["ALL"]


def test_commands_are_ones_that_the_programs_take(compose: Compose, images: Dockerfile) -> None:
    from prefect.cli.server import server_app
    from typer.main import get_command

    from flows.cli.main import app

    known: Any = get_command(app)
    commands = [service.command for service in compose.services.values() if service.command]
    assert len(commands) == 3
    for program, *words in [*commands, images.command("cpu"), images.command("cuda")]:
        assert program == "distill"
        if words != ["--help"]:
            name, *options = (VARIABLE.sub(lambda found: example()[found[1]], word) for word in words)
            known.commands[name].make_context(name, options)  # raises for an option that there is not
    prefect, group, *words = images.command("server")
    assert (prefect, group) == ("prefect", "server")
    server_app.parse_args(words, exit_on_error=False, print_error=False)


def test_health_is_asked_by_what_the_image_has(compose: Compose, images: Dockerfile) -> None:
    for target in ("server", "store"):
        command = images.health_command(target)
        assert command is not None
        program, script, _ = command
        assert (program, script) == ("python", "/opt/healthy.py")
        assert any(place == script for _, _, place in copies(images.stages[target]))
    database = compose.services["database"].healthcheck
    assert database and database.test[:2] == ["CMD", "pg_isready"]


@pytest.mark.service
def test_the_stores_command_serves_those_who_have_its_keys(images: Dockerfile, tmp_path: Path) -> None:
    """The very command of the image, on ports of its own, and the image's question after its health."""
    port, *others = free_ports(PORTS)
    changed = {"-dir": str(tmp_path), "-ip.bind": "127.0.0.1", "-s3.port": str(port)}
    command = [
        f"{name}={changed.get(name, value)}" if value else name for name, _, value in (w.partition("=") for w in images.command("store"))
    ]
    inner = ("master", "volume", "filer", "admin")
    command += [f"-{name}.port={number}" for name, number in zip(inner, others, strict=True)]
    command[0] = str(Path(sys.executable).with_name(command[0]))
    keys = {"AWS_ACCESS_KEY_ID": "akeyofthestore", "AWS_SECRET_ACCESS_KEY": "itssecretkey"}
    question = [sys.executable, str(FOLDER / "healthy.py"), f"http://127.0.0.1:{port}/healthz"]
    assert subprocess.run(question, capture_output=True, text=True, check=False).returncode == 1
    with (tmp_path / "log.txt").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path, env=keys | {"HOME": str(tmp_path)})
    try:
        store = ObjectStore(f"http://127.0.0.1:{port}", "distill", keys["AWS_ACCESS_KEY_ID"], keys["AWS_SECRET_ACCESS_KEY"])
        end = time.monotonic() + 600
        while not store.answers():
            assert server.poll() is None and time.monotonic() < end, (tmp_path / "log.txt").read_text()
            time.sleep(0.2)
        assert subprocess.run(question, capture_output=True, text=True, check=False).returncode == 0
        assert not ObjectStore(store.endpoint, store.bucket, store.access_key, "another").answers()
    finally:
        server.kill()
        server.wait()
    assert keys["AWS_SECRET_ACCESS_KEY"] not in (tmp_path / "log.txt").read_text()
