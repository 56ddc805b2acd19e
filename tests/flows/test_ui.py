"""The chain as a person runs it from Prefect's UI: a real server with a worker, as `distill services up` starts them, and a headless Chromium.

Run where `DISTILL_TEST_UI` is set: it takes minutes, and a machine that is busy otherwise makes Prefect's UI slower than this module waits. It leaves
a picture of every page in the test's folder, to be looked at: `DISTILL_TEST_UI=1 pytest tests/flows/test_ui.py --basetemp FOLDER`.
"""

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flows import services
from infra.seaweedfs import free_ports
from tests.browser import CHROMIUM, Tab, browser
from tests.flows.conftest import ENGINE, ToyChain, wait_until

logger = logging.getLogger(__name__)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.service,
    pytest.mark.skipif("DISTILL_TEST_UI" not in os.environ, reason="DISTILL_TEST_UI is not set: see the module"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome is on the PATH to open the UI in"),
]
STAGES = ["ingest", "measure", "select", "teacher", "encode"]


@dataclass(frozen=True)
class Ui:
    """Prefect's UI in a browser, and the API that it talks to."""

    tab: Tab
    client: Any
    url: str
    pictures: Path

    def look(self, name: str) -> None:
        """Leave a picture of what is open."""
        self.pictures.mkdir(exist_ok=True)
        self.tab.picture(self.pictures / f"{name}.png")

    def wait(self, run: str, times: int = 1) -> Any:
        """Wait until a run has begun so many times and ended; the run."""

        def ended() -> Any:
            found = self.client.read_flow_run(run)
            return found if found.state.is_final() and found.run_count >= times else None

        return wait_until(ended, f"the end of the run {run}")

    def wait_for_tasks(self, run: str, states: dict[str, str], times: int = 1) -> None:
        """Wait until the server knows these states of the tasks of a run's attempt of that number, by name: events travel on their own."""
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

        filter_ = FlowRunFilter(id=FlowRunFilterId(any_=[run]))

        def arrived() -> bool:
            found = self.client.read_task_runs(flow_run_filter=filter_)
            return {task.name: task.state.name for task in found if task.flow_run_run_count == times} == states

        wait_until(arrived, f"the states of the tasks, {states}")


@pytest.fixture
def ui(chain: ToyChain) -> Iterator[Ui]:
    """The services of one machine, whose worker runs the toys, and a browser."""
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.actions import WorkPoolUpdate

    (port,) = free_ports(1)
    url, folder = f"http://127.0.0.1:{port}", chain.folder / "services"
    with (chain.folder / "services.log").open("w") as log:
        up = chain.command(
            "services", "up", "--folder", str(folder), "--port", str(port), "--pool", "cpu", "--store", chain.address, output=log
        )
        try:
            wait_until(lambda: services.is_up(folder) or up.poll() is not None, "the start of the services")
            assert up.poll() is None, Path(log.name).read_text()
            client = SyncPrefectClient(f"{url}/api")
            template = client.read_work_pool("cpu").base_job_template
            template["variables"]["properties"]["command"]["default"] = f'python -c "{ENGINE}"'
            client.update_work_pool("cpu", WorkPoolUpdate(base_job_template=template))
            with browser(chain.folder / "profile") as tab:
                yield Ui(tab, client, url, chain.folder / "pictures")
        finally:
            up.terminate()
            up.wait()


def property_of(label: str) -> str:
    """The part of the form that a label heads, as an expression."""
    find = f"[...document.querySelectorAll('label')].find(e => e.innerText.trim() === {json.dumps(label)})"
    return f"({find})?.closest('.group')"


def field(label: str) -> str:
    return f"{property_of(label)}?.querySelector('textarea, input')"


def open_form(ui: Ui, deployment: Any) -> None:
    """Go to the form of a deployment as a person does. It comes empty: after a refusal Prefect's wants Submit pressed twice."""
    ui.tab.visit(f"{ui.url}/v2/deployments/deployment/{deployment.id}")
    ui.tab.click("Run", "button")
    ui.tab.click("Custom run", "menuitem")
    ui.tab.wait_for_text("until (Optional)")


def ask(ui: Ui, button: str, answer: str, within: str = "document") -> None:
    """Press a button until the server has done it.

    Prefect's server on SQLite answers a busy moment with 503 ("database is locked"), by design: its Python client then asks again, the UI shows a
    message and leaves it to the person. With Postgres there is no such moment.
    """
    refusals = "[...document.querySelectorAll('[data-sonner-toast][data-type=error]')].map(e => e.innerText.trim())"
    for _ in range(5):
        ui.tab.click(button, "button", within)
        told = ui.tab.wait(
            f"document.body.innerText.includes({json.dumps(answer)}) ? 'done' : {refusals}.join()", f"what comes of {button}"
        )
        if told == "done":
            return
        logger.warning("%s: %s", button, told)
        ui.tab.wait(f"!{refusals}.length", "the end of the message")
    pytest.fail(f"{button}: refused five times, at last with {told}")


def start_run(ui: Ui) -> str:
    """Send the form, and follow the link to the run: its id."""
    ask(ui, "Submit", "scheduled to start now")
    ui.tab.click("View run", "button")
    return str(ui.tab.wait("location.pathname.match('flow-run/([0-9a-f-]{36})')?.[1]", "the run's page"))


def see_a_form_that_guides_and_refuses(ui: Ui) -> None:
    """Fields have the recipe's own names, sentences, units, defaults, choices and bounds; what is wrong is refused before there is a run."""
    tab = ui.tab
    shown = tab.text()
    assert "The recipe, field by field; or its file's path" in shown and "Path or address (local, s3://) of a parquet or csv file" in shown
    assert "dropped before download (pixels)" in shown
    assert "lightning (Optional)" in shown and "Field (Optional)" not in shown and "Config (Optional)" not in shown
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
    ui.look("form-refused")


def test_the_chain_is_started_watched_and_retried_from_the_ui(chain: ToyChain, ui: Ui) -> None:
    tab = ui.tab
    deployment = ui.client.read_deployment_by_name("distill-chain/cpu")
    open_form(ui, deployment)
    see_a_form_that_guides_and_refuses(ui)
    assert [run for run in ui.client.read_flow_runs() if run.deployment_id == deployment.id] == []

    # The recipe's text, as one has it in a file elsewhere.
    open_form(ui, deployment)
    tab.click("file or YAML", "tab", property_of("recipe"))
    tab.type(field("recipe"), Path(chain.recipe_file()).read_text())
    tab.click("str", "tab", property_of("until (Optional)"))
    tab.type(field("until (Optional)"), "select")
    ui.look("form-filled")
    run = start_run(ui)
    assert ui.wait(run).state.is_completed()
    ui.wait_for_tasks(run, dict.fromkeys(STAGES[:3], "Completed"))
    assert chain.runs() == STAGES[:3]
    tab.wait_for_text("Completed")
    ui.look("run-completed")
    tab.click("Artifacts", "tab")
    for key in ("ingest", "measure", "select"):
        tab.wait_for_text(f"\n{key}\n")
    ui.look("run-artifacts")
    tab.wait("!!document.querySelector('a[href$=\"/artifacts/key/chain\"]')", "the chain's artifact")
    tab.js("document.querySelector('a[href$=\"/artifacts/key/chain\"]').click()")
    tab.wait(
        "location.pathname.endsWith('/key/chain') && !!document.querySelector('a[href*=\"/artifacts/artifact/\"]')", "the newest of it"
    )
    tab.js("document.querySelector('a[href*=\"/artifacts/artifact/\"]').click()")
    tab.wait_for_text(f"Store: {chain.address}")
    ui.look("artifact")
    assert "time when made" in tab.text() and chain.store.latest("toy", "select").identity[:12] in tab.text()

    # A stage fails for a reason outside, which is mended then; Retry finds what is finished.
    chain.fail("encode", "RunFailed")
    open_form(ui, deployment)
    tab.click("file or YAML", "tab", property_of("recipe"))
    tab.type(field("recipe"), chain.recipe_file())
    run = start_run(ui)
    failed = ui.wait(run)
    assert failed.state.is_failed() and "encode was told to" in failed.state.message
    ui.wait_for_tasks(run, dict.fromkeys(STAGES[:3], "Cached") | {"teacher": "Completed", "encode": "Failed"})
    tab.wait_for_text("Failed")
    tab.click("Artifacts", "tab")
    tab.wait_for_text("why encode failed")
    ui.look("run-failed")
    tab.click("Open menu", "button")
    tab.click("Retry", "menuitem")
    ask(ui, "Retry", "scheduled for retry", "document.querySelector('[role=alertdialog]')")
    again = ui.wait(run, times=2)
    assert again.state.is_completed(), again.state.message
    ui.wait_for_tasks(run, dict.fromkeys(STAGES[:4], "Cached") | {"encode": "Completed"}, times=2)
    tab.wait_for_text("Completed")
    ui.look("run-retried")
    assert chain.runs() == ["teacher", "encode", "encode"]
    assert chain.store.verify(chain.store.latest("toy", "encode")) == []
