"""The report of a chain that has ended."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from flows.report import chain_report, planned_report
from infra.outside import content_digest
from infra.store import ArtifactStore
from schemas.base import digest
from schemas.errors import BadInput
from schemas.loading import load_recipe
from schemas.manifest import Cost, Evaluation, ImageShards, Lineage, Manifest, PublishedModel
from schemas.recipe import Recipe
from stages.plan import Plan, make_plan
from stages.reports.ancestry import lineage_row
from stages.reports.chain import chain_part
from tests.workspaces import open_store

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "tiny.yaml"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(RECIPE, ["seed=5"])


@pytest.fixture(scope="module")
def plan(recipe: Recipe) -> Plan:
    return make_plan(recipe, digest)


def publish(store: ArtifactStore, plan: Plan, node: str, content: Any, folder: Path, *, seconds: float) -> Manifest:
    """An artifact with the identity and the inputs of the plan, and of content what the report reads."""
    lineage = Lineage(
        stage=node, node=node, revision=1, config={}, inputs=dict(plan.input_digests[node]), source_revision="a" * 40,
        libraries={"torch": "2.0"}, device="cpu", cost=Cost(wall_seconds=seconds),
    )  # fmt: skip
    return store.publish(folder, identity=plan.identities[node], content=content, lineage=lineage)


def test_the_page_of_an_ended_chain_has_costs_and_recipe(tmp_path: Path, recipe: Recipe, plan: Plan) -> None:
    store = open_store(tmp_path)
    with pytest.raises(BadInput, match=r"tiny: its stage evaluate has not run on .*expected a recipe that distill run has finished"):
        planned_report(plan, store)
    other, page = tmp_path / "other", tmp_path / "page"
    other.mkdir()
    page.mkdir()
    (other / "file").write_text("text")
    ingest = publish(store, plan, "ingest", ImageShards(rows_in_table=1, images=1, shards=1), other, seconds=100)
    (page / "report.html").write_text(f"<p>above</p>{chain_part([lineage_row(ingest)])}<p>below</p>", encoding="utf-8")
    evaluation = publish(store, plan, "evaluate", Evaluation(scores={}, prompts=1), page, seconds=30)
    alone = chain_report(recipe, {"evaluate": evaluation}, store)
    assert "2 min 10 s" in alone, "both stages"
    publish(store, plan, "publish", PublishedModel(variants={}), other, seconds=10)
    found = planned_report(plan, store)
    assert found.startswith("<p>above</p>") and found.endswith("<p>below</p>")
    for said in (
        "2 min 20 s",
        "seed: 5",
        "a" * 40,
        "torch 2.0",
        "distill run tiny.yaml",
        f"distill verify {plan.identities['publish'][:12]}",
    ):
        assert said in found, said
    for identity in (plan.identities[node] for node in ("ingest", "evaluate", "publish")):
        assert f'id="a-{identity[:12]}"' in found
    address = store.file_address(evaluation, "report.html")
    assert Path(address.removeprefix("file://")).read_bytes() == (page / "report.html").read_bytes()


def test_a_recipe_without_evaluation_has_no_report(tmp_path: Path) -> None:
    plan = make_plan(load_recipe(RECIPE, ["evaluate=null", "publish=null"]), digest)
    with pytest.raises(BadInput, match="its stage evaluate is not in the recipe"):
        planned_report(plan, open_store(tmp_path))


@pytest.mark.usefixtures("restored_process")
def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flows.cli import main

    (tmp_path / "table.csv").write_text("url,caption\n")
    changes = [f"ingest.table={tmp_path / 'table.csv'}", f"teacher.source={RECIPE.parent / 'tiny_teacher'}", "publish=null"]
    plan = make_plan(load_recipe(RECIPE, changes), content_digest)
    store = open_store(tmp_path)
    (tmp_path / "page").mkdir()
    row = {"node": "evaluate", "kind": "evaluation", "identity": "0" * 64, "stage": "evaluate", "revision": 1, "inputs": {}}
    (tmp_path / "page" / "report.html").write_text(chain_part([row]), encoding="utf-8")
    publish(store, plan, "evaluate", Evaluation(scores={}, prompts=1), tmp_path / "page", seconds=90)
    told = [argument for change in changes for argument in ("--set", change)]
    with pytest.raises(SystemExit) as ended:
        main(["report", str(RECIPE), *told, "--store", store.address, "--output", str(tmp_path / "new" / "page.html")])
    assert ended.value.code == 0, capsys.readouterr()
    assert "1 min 30 s" in (tmp_path / "new" / "page.html").read_text(encoding="utf-8")


@pytest.mark.service
@pytest.mark.usefixtures("prefect_server")
def test_the_runs_page_links_to_the_whole_report(tmp_path: Path, recipe: Recipe, plan: Plan) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    from flows.chain import link_report

    store = open_store(tmp_path)
    (tmp_path / "page").mkdir()
    row = {"node": "evaluate", "kind": "evaluation", "identity": "0" * 64, "stage": "evaluate", "revision": 1, "inputs": {}}
    (tmp_path / "page" / "report.html").write_text(chain_part([row]), encoding="utf-8")
    evaluation = publish(store, plan, "evaluate", Evaluation(scores={}, prompts=1), tmp_path / "page", seconds=90)
    assert store.report_address(evaluation) is None
    link_report(recipe, {"evaluate": evaluation}, store)
    address = store.report_address(evaluation)
    assert address is not None
    left = Path(address.removeprefix("file://")).read_text(encoding="utf-8")
    assert "1 min 30 s" in left and "distill run tiny.yaml" in left, "what it took, and the commands"
    assert store.verify(evaluation) == [], "beside the artifact"
    link_report(recipe, {"ingest": evaluation.model_copy(update={"content": ImageShards(rows_in_table=1, images=1, shards=1)})}, store)
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["report"])))
    assert f"[report.html]({address})" in [item.data for item in found]
    store.remove(evaluation.identity)
    assert [item.reason for item in store.gc(dry_run=False, older_than=timedelta(seconds=-5)).items] == [
        "page about an artifact that is no more"
    ]
    assert store.report_address(evaluation) is None
