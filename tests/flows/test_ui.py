"""The chain as a person runs it from Prefect's UI: a real server with a worker, as `distill services up` starts them, and a headless Chromium."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import services
from infra.demo.server import serve
from infra.seaweedfs import free_ports
from infra.store import ArtifactStore
from tests.browser import CHROMIUM, Tab, browser
from tests.e2e.nano import Place, write_inputs, write_recipe
from tests.flows.conftest import PATIENCE_SECONDS, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.service,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome is on the PATH to open the UI in"),
]
STAGES = ["ingest", "measure", "select", "teacher", "encode"]


@dataclass(frozen=True)
class Ui:
    """Prefect's UI in a browser, the API that it talks to, and what the worker behind it reads and writes."""

    tab: Tab
    client: Any
    url: str
    recipe: Path
    store: ArtifactStore

    def wait(self, run: str, times: int = 1) -> Any:
        """Wait until a run has begun so many times and ended; the run."""

        def ended() -> Any:
            found = self.client.read_flow_run(run)
            return found if found.state.is_final() and found.run_count >= times else None

        return wait_until(ended, f"the end of the run {run}")

    def tasks(self, run: str) -> dict[str, str]:
        """States of a run's tasks by name, once all of them have arrived at the server."""
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

        filter_ = FlowRunFilter(id=FlowRunFilterId(any_=[run]))

        def arrived() -> Any:  # events travel on their own
            found = self.client.read_task_runs(flow_run_filter=filter_)
            return found if found and all(task.state.is_final() for task in found) else None

        return {task.name: task.state.name for task in wait_until(arrived, "the states of the tasks")}


@pytest.fixture
def ui(tmp_path: Path) -> Iterator[Ui]:
    from prefect.client.orchestration import SyncPrefectClient

    with serve(write_inputs(tmp_path)) as pictures:
        recipe = write_recipe(tmp_path, pictures)
        sections = yaml.safe_load(recipe.read_text())
        recipe.write_text(yaml.safe_dump({name: sections[name] for name in ("name", "seed", *STAGES)}))
        (port,) = free_ports(1)
        url = f"http://127.0.0.1:{port}"
        place = Place(tmp_path, recipe, f"{url}/api", f"file://{tmp_path / 'store'}")
        folder = tmp_path / "services"
        up = place.start("services", "up", "--folder", str(folder), "--port", str(port), "--pool", "cpu", "--store", place.address)
        try:
            assert up.wait_until(lambda: services.is_up(folder)), up.told
            with browser(tmp_path / "profile") as tab:
                yield Ui(tab, SyncPrefectClient(f"{url}/api"), url, recipe, place.store)
        finally:
            up.process.terminate()
            up.wait()


def property_of(label: str) -> str:
    """The part of the form that a label heads, as an expression."""
    find = f"[...document.querySelectorAll('label')].find(e => e.innerText.trim() === {json.dumps(label)})"
    return f"({find})?.closest('.group')"


def field(label: str) -> str:
    return f"{property_of(label)}?.querySelector('textarea, input')"


def start_run(ui: Ui) -> str:
    """Send the form, and follow the link to the run: its id."""
    ui.tab.click("Submit", "button")
    ui.tab.wait_for_text("scheduled to start now")
    ui.tab.click("View run", "button")
    return str(ui.tab.wait("location.pathname.match('flow-run/([0-9a-f-]{36})')?.[1]", "the run's page"))


def damage(store: ArtifactStore, stage: str) -> tuple[Path, bytes]:
    """Change one bit of the largest file of a stage's artifact; the file, and what was in it."""
    artifact = Path(store.address.removeprefix("file://")) / "artifacts" / store.latest("nano", stage).identity
    path = max((path for path in (artifact / "files").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    whole = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    return path, whole


def test_the_chain_is_started_watched_and_retried_from_the_ui(ui: Ui, tmp_path: Path) -> None:
    tab = ui.tab
    deployment = ui.client.read_deployment_by_name("distill-chain/cpu")
    tab.visit(f"{ui.url}/v2/deployments/deployment/{deployment.id}")
    tab.click("Run", "link")

    # The form names the recipe's fields as the recipe does, with sentences, units and choices; a bad value is refused by it, or by the server.
    tab.wait_for_text("lightning (Optional)")
    shown = tab.text()
    assert "The recipe, field by field; or its file's path" in shown and "Path or address (local, s3://) of a parquet or csv file" in shown
    assert "dropped before download (pixels)" in shown
    assert "Field (Optional)" not in shown and "Config (Optional)" not in shown
    assert tab.js(f"{field('min_side_px (Optional)')}.value") == "1024"
    tab.click("Select crop", "button")
    tab.wait("[...document.querySelectorAll('[role=option]')].map(e => e.innerText.trim()).join() === 'centre,random'", "the choices")
    tab.press("Escape", 27)
    tab.type(field("name"), "No Name")
    tab.type(field("table"), "urls.parquet")
    tab.type(field("seed (Optional)"), "-1")
    tab.click("Submit", "button")
    tab.wait(f"document.activeElement === {field('seed (Optional)')} && !document.activeElement.checkValidity()", "the refusal of the seed")
    tab.type(field("seed (Optional)"), "3")
    tab.click("Submit", "button")
    tab.wait_for_text("Validation failed for field 'recipe.name'")
    assert ui.client.read_flow_runs() == [] or all(run.deployment_id != deployment.id for run in ui.client.read_flow_runs())

    # The recipe's text, as one has it in a file elsewhere.
    tab.click("file or YAML", "tab", property_of("recipe"))
    tab.type(field("recipe"), ui.recipe.read_text())
    tab.click("str", "tab", property_of("until (Optional)"))
    tab.type(field("until (Optional)"), "select")
    run = start_run(ui)
    assert ui.wait(run).state.is_completed()
    assert ui.tasks(run) == dict.fromkeys(["ingest", "measure", "select"], "Completed")
    tab.wait_for_text("Completed")
    tab.click("Artifacts", "tab")
    for key in ("ingest", "measure", "select", "chain"):
        tab.wait_for_text(f"\n{key}\n")
    tab.wait("[...document.querySelectorAll('a')].find(e => e.href.endsWith('/artifacts/key/chain'))?.click() === undefined", "the chain's page")
    tab.wait_for_text(f"Store: {ui.store.address}")
    assert "time when made" in tab.text() and ui.store.latest("nano", "select").identity[:12] in tab.text()

    # A stage fails for bytes that were changed on the store, which are mended; Retry finds what is finished.
    damaged, whole = damage(ui.store, "select")
    tab.visit(f"{ui.url}/v2/deployments/deployment/{deployment.id}/run")
    tab.click("file or YAML", "tab", property_of("recipe"))
    tab.type(field("recipe"), str(ui.recipe))
    run = start_run(ui)
    failed = ui.wait(run)
    assert failed.state.is_failed() and damaged.name in failed.state.message
    assert ui.tasks(run) == dict.fromkeys(STAGES[:3], "Cached") | {"teacher": "Completed", "encode": "Failed"}
    tab.wait_for_text("Failed")
    tab.click("Artifacts", "tab")
    tab.wait_for_text("why encode failed")
    damaged.write_bytes(whole)
    tab.click("Retry", "button")
    tab.wait("document.querySelector('[role=dialog], [role=alertdialog]')", "the question whether to retry")
    tab.click("Retry", "button", "document.querySelector('[role=dialog], [role=alertdialog]')")
    again = ui.wait(run, times=2)
    assert again.state.is_completed(), again.state.message
    assert ui.tasks(run) == dict.fromkeys(STAGES[:4], "Cached") | {"encode": "Completed"}
    tab.wait_for_text("Completed")
    assert ui.store.verify(ui.store.latest("nano", "encode")) == []
