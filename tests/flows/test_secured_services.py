"""The services of one machine with user and password, secrets planted around them: who gets in, where they listen, and what they write."""

import base64
import contextlib
import json
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import psutil
import pytest

from flows import services
from flows.server import check_configured
from infra.seaweedfs import free_ports
from infra.store.s3 import S3Storage
from infra.store.settings import StoreSettings
from schemas.errors import BadInput
from tests.flows.conftest import ENGINE, PATIENCE_SECONDS, ToyChain, wait_until
from tests.flows.test_secrets import PLANTED, traces, written

AUTHENTICATION = PLANTED["PREFECT_API_AUTH_STRING"]
KEEPERS = {"services/environment", "services/state.json", "services/store/known.json", "services/store/s3.json"}
"""Files that are there to hold credentials, for their owner alone."""


class Server:
    """Prefect's API as curl sees it."""

    def __init__(self, url: str) -> None:
        self._url = url

    def ask(self, path: str, body: Any = None, method: str | None = None, authentication: str | None = AUTHENTICATION) -> Any:
        request = urllib.request.Request(f"{self._url}/{path}", method=method)
        if authentication:
            request.add_header("Authorization", f"Basic {base64.b64encode(authentication.encode()).decode()}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        content = wait_until(lambda: self._answer(request), f"an answer to {path}")[0]
        return json.loads(content) if content else None

    def _answer(self, request: urllib.request.Request) -> tuple[bytes] | None:
        """None while a busy server asks for patience, as Prefect's does when its database is locked."""
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
                return (answer.read(),)
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.SERVICE_UNAVAILABLE:
                raise
            return None

    def refusal(self, path: str, authentication: str | None) -> int:
        with pytest.raises(urllib.error.HTTPError) as refused:
            self.ask(path, authentication=authentication)
        return refused.value.code

    def finished(self, run: str, times: int) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            found: dict[str, Any] = self.ask(f"flow_runs/{run}")
            return found if found["run_count"] >= times and found["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED") else None

        found: dict[str, Any] = wait_until(look, f"the end of run {run}")
        return found


@pytest.fixture
def reach(chain: ToyChain) -> Iterator[dict[str, str]]:
    """Services that are up, and what a client of theirs needs in its environment."""
    folder = chain.folder / "services"
    where = ("--folder", str(folder), "--port", str(free_ports(1)[0]), "--pool", "cpu")
    environment = {name: value for name, value in PLANTED.items() if name != "PREFECT_SERVER_DATABASE_CONNECTION_URL"}
    up = chain.command("services", "up", "--detach", *where, **environment)
    output, errors = up.communicate(timeout=PATIENCE_SECONDS)
    assert up.returncode == 0, (output, errors)
    try:
        (chain.folder / "said.txt").write_text(output + errors)
        yield json.loads((folder / "state.json").read_text())["environment"]
    finally:
        with contextlib.suppress(BadInput):  # the test has stopped them, where it came to its end
            services.stop_services(folder)


@pytest.mark.service
@pytest.mark.slow
def test_only_those_who_know_the_password_get_in_and_it_is_written_nowhere(
    chain: ToyChain, reach: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(reach["PREFECT_API_URL"])
    folder = chain.folder / "services"

    # One setting: the server asks for it, and the worker and the deployments, which are there, had it.
    assert reach["PREFECT_API_AUTH_STRING"] == AUTHENTICATION
    assert [server.refusal("admin/version", given) for given in (None, "planteduser:wrong")] == [401, 401]
    settings = json.loads(urllib.request.urlopen(reach["PREFECT_API_URL"].removesuffix("/api") + "/ui-settings", timeout=60).read())
    assert (settings["auth"], settings["api_url"]) == ("BASIC", reach["PREFECT_API_URL"])

    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    wrong = {PREFECT_API_URL: reach["PREFECT_API_URL"], PREFECT_API_AUTH_STRING: "planteduser:wrong"}
    with temporary_settings(wrong), pytest.raises(BadInput, match="asks for user:password; expected them in PREFECT_API_AUTH_STRING"):
        check_configured()

    supervisor = psutil.Process(json.loads((folder / "state.json").read_text())["pid"])
    listening = [
        c.laddr.ip for process in supervisor.children(recursive=True) for c in process.net_connections("tcp") if c.status == "LISTEN"
    ]
    assert listening and set(listening) == {"127.0.0.1"}

    # A run that fails with a traceback in its log, and is retried.
    template = server.ask("work_pools/cpu")["base_job_template"]
    template["variables"]["properties"]["command"]["default"] = f'python -c "{ENGINE}"'
    server.ask("work_pools/cpu", {"base_job_template": template}, "PATCH")
    chain.fail("encode", "ZeroDivisionError")
    deployment = server.ask("deployments/name/distill-chain/cpu")["id"]
    run = server.ask(f"deployments/{deployment}/create_flow_run", {"parameters": {"recipe": chain.data()}})["id"]
    assert server.finished(run, times=1)["state"]["type"] == "FAILED"
    server.ask(f"flow_runs/{run}/set_state", {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}, "force": True})
    assert server.finished(run, times=2)["state"]["type"] == "COMPLETED"

    # All that is left of it.
    for name, value in reach.items():
        monkeypatch.setenv(name, value)
    bucket, _, prefix = reach["DISTILL_STORE_ADDRESS"].removeprefix("s3://").partition("/")
    storage = S3Storage(bucket, prefix, StoreSettings())
    objects = {info.key: storage.read(info.key) for info in storage.objects("")}
    assert sum(key.endswith("/manifest.json") for key in objects) == len(chain.data()) - 1
    services.stop_services(folder)  # the database's last writes, and the last lines of the logs
    files = dict(written(chain.folder))
    with sqlite3.connect(next(folder.rglob("prefect.db"))) as database:
        rows = "\n".join(database.iterdump())
    assert "ZeroDivisionError" in rows
    secrets = [*PLANTED.values(), *AUTHENTICATION.split(":"), reach["AWS_ACCESS_KEY_ID"], reach["AWS_SECRET_ACCESS_KEY"]]
    everything = {**files, **objects, "database": rows.encode()}
    found = {place for place, content in everything.items() if list(traces(secrets, place, content))}
    assert found == KEEPERS, "what is there to hold them does, and nothing else"
    assert {(chain.folder / name).stat().st_mode & 0o777 for name in KEEPERS} == {0o600}
