"""Quality gates: what they may ask for, told before any work, and the figures they find."""

from pathlib import Path
from typing import Any

import pytest

from schemas.errors import BadInput
from schemas.gates import Gate
from schemas.loading import load_recipe, parse_recipe
from schemas.manifest import Evaluation, Manifest, Selection, StudentUNet
from stages.gates import check_gates, look
from stages.plan import identity_of, nodes_of
from stages.training.metrics import write_metrics
from tests.workspaces import make_workspace, open_store

TINY = Path(__file__).resolve().parents[2] / "recipes" / "tiny.yaml"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def published(tmp_path: Path, content: Any, rows: list[dict[str, float]] | None = None) -> tuple[Manifest, Any]:
    store = open_store(tmp_path)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "report.html").write_text("<p>")
    if rows is not None:
        write_metrics(rows, tmp_path / "files" / "metrics.parquet")
    return make_workspace(tmp_path, store).publish(tmp_path / "files", content), store


def test_a_score_of_the_report(tmp_path: Path) -> None:
    gate = Gate(after="evaluate", metric="fid_teacher", student="lcm", steps=4, at_most=60)
    manifest, store = published(tmp_path, Evaluation(scores={"lcm@4": {"fid_teacher": 71.25}, "lcm@8": {"fid_teacher": 3}}, prompts=1))
    verdict = look("fid", gate, manifest, store)
    assert (verdict.value, verdict.met) == (71.25, False)
    assert verdict.sentence == (
        "gate fid after evaluate: fid_teacher of lcm in 4 steps is 71.25, expected at most 60; "
        f"the report: distill show {manifest.identity[:12]} --file report.html"
    )
    assert look("fid", gate.model_copy(update={"at_most": 71.25}), manifest, store).met
    missing = look("fid", gate.model_copy(update={"student": "dmd"}), manifest, store)
    assert not missing.met and "is nan" in missing.sentence, "a figure that is not there passes no gate"


def test_loss_is_the_mean_of_the_last_tenth_of_the_kept_steps(tmp_path: Path) -> None:
    content = StudentUNet(
        method="m", steps=(4,), timesteps={}, sampler="trailing", prediction_type="epsilon", guidance_scale=1, teacher="0" * 64,
        training_steps=30, best_fid=12.5,
    )  # fmt: skip
    taken_back = [{"step": 31, "student.loss": 1e9}, {"step": 32, "student.loss": 1e9}]
    rows = [{"step": step, "student.loss": float(step)} for step in range(1, 31)]
    manifest, store = published(tmp_path, content, [*rows[:28], *({**row, "step": row["step"] - 2} for row in taken_back), *rows[28:]])
    gate = Gate(after="lightning-8-4", metric="loss", at_most=29)
    assert look("loss", gate, manifest, store).value == pytest.approx((28 + 29 + 30) / 3)
    assert look("best", gate.model_copy(update={"metric": "best_fid"}), manifest, store).value == 12.5


def test_a_number_of_the_artifact(tmp_path: Path) -> None:
    manifest, store = published(tmp_path, Selection(source="0" * 64, images_in=10, images=4))
    verdict = look("images", Gate(after="select", metric="images", at_least=5), manifest, store)
    assert (verdict.value, verdict.met) == (4, False)
    assert look("images", Gate(after="select", metric="images", at_least=1, at_most=4), manifest, store).met


def recipe_with(**gates: dict[str, Any]) -> Any:
    recipe = load_recipe(TINY)
    return parse_recipe(recipe.model_dump(mode="json") | {"gates": gates})


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        ({"after": "evaluate", "metric": "fid_teacher", "student": "lightning-8-4", "steps": 4, "at_most": 60}, None),
        ({"after": "evaluate", "metric": "fid_real", "student": "teacher", "steps": 32, "at_most": 60}, None),
        ({"after": "evaluate", "metric": "fid_real", "student": "lcm", "steps": 2, "at_most": 60}, None),
        ({"after": "lightning-8-4", "metric": "loss", "at_most": 1}, None),
        ({"after": "encode", "metric": "samples", "at_least": 1}, None),
        ({"after": "lightning-9-4", "metric": "loss", "at_most": 1}, r"gates\.g\.after: found 'lightning-9-4'; expected one of ingest, "),
        (
            {"after": "lightning-8-4", "metric": "best_fid", "at_most": 1},
            r"gates\.g\.metric: found 'best_fid'; after lightning-8-4 expected",
        ),
        ({"after": "encode", "metric": "loss", "at_most": 1}, r"gates\.g\.metric: found 'loss'; after encode expected one of samples"),
        (
            {"after": "evaluate", "metric": "fid", "student": "lcm", "steps": 4, "at_most": 1},
            r"gates\.g\.metric: found 'fid'; after evaluate expected one of fid_teacher, fid_real",
        ),
        (
            {"after": "evaluate", "metric": "fid_teacher", "student": "dmd", "steps": 4, "at_most": 1},
            r"gates\.g\.student: found 'dmd'; expected one of teacher, lightning",
        ),
        (
            {"after": "evaluate", "metric": "fid_teacher", "student": "lightning-8-4", "steps": 8, "at_most": 1},
            r"gates\.g\.steps: found 8; lightning-8-4 is measured in 4",
        ),
    ],
)
def test_what_a_gate_may_ask_for(gate: dict[str, Any], expected: str | None) -> None:
    recipe = recipe_with(g=gate)
    if expected is None:
        check_gates(recipe.gates, nodes_of(recipe))
    else:
        with pytest.raises(BadInput, match=expected):
            check_gates(recipe.gates, nodes_of(recipe))


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        ({"after": "select", "metric": "images"}, r"gates\.g\.at_most: found None; a gate that everything passes"),
        ({"after": "select", "metric": "images", "at_most": 1, "at_least": 2}, r"gates\.g\.at_least: found 2\.0; nothing passes"),
        ({"after": "evaluate", "metric": "fid_teacher", "at_most": 1}, r"gates\.g\.student: found None; .*\n.*gates\.g\.steps: found None"),
        ({"after": "select", "metric": "images", "at_most": 1, "steps": 4}, r"gates\.g\.steps: found 4; only evaluate has a row"),
        ({"after": "select", "metric": "images", "at_most": "many"}, r"gates\.g\.at_most: found 'many'; expected"),
    ],
)
def test_a_wrong_gate_is_refused_with_its_place(gate: dict[str, Any], expected: str) -> None:
    with pytest.raises(BadInput, match=expected):
        recipe_with(g=gate)


def test_gates_are_no_part_of_identities_and_no_section_for_a_pool() -> None:
    gate = {"after": "encode", "metric": "samples", "at_least": 1}
    with_gate, without = recipe_with(g=gate), recipe_with()
    assert [identity_of(node, {}) for node in nodes_of(with_gate)] == [identity_of(node, {}) for node in nodes_of(without)]
    with pytest.raises(BadInput, match=r"pools\.gates: found 'gpu'; is no stage's section"):
        parse_recipe(without.model_dump(mode="json") | {"pools": {"gates": "gpu"}})
