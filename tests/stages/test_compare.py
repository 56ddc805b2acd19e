"""`distill compare`: evaluated runs side by side, and what keeps their figures from being compared."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.cli import main
from infra.store import ArtifactStore
from schemas.base import digest
from schemas.errors import BadInput
from schemas.manifest import Evaluation, Lineage, Manifest
from stages.compare import Evaluated, compare, read_report
from stages.compare.comparison import Figure
from stages.compare.page import render_comparison

Scores = dict[tuple[str, int], tuple[float, float, float]]
FIRST: Scores = {("teacher", 8): (1.0, 0.5, 1.5), ("lcm", 4): (5.0, 4.0, 6.0), ("lcm", 2): (9.0, 8.0, 10.0)}
SECOND: Scores = {("teacher", 8): (1.0, 0.5, 1.5), ("lcm", 4): (3.0, 2.5, 3.5), ("dmd", 1): (7.0, 6.0, 8.0)}


def report(scores: Scores, **samples: Any) -> dict[str, Any]:
    """A report with FIDs to the teacher, and what a comparison reads of settings."""
    rows = [
        {"family": family, "steps": steps, "scores": {"fid_teacher": value}, "intervals": {"fid_teacher": [low, high]}}
        for (family, steps), (value, low, high) in scores.items()
    ]
    return {
        "artifact": digest(sorted(map(str, scores))),
        "extractor": {"name": "inception"},
        "metrics": {"fid_teacher": "FID against other samples of the teacher"},
        "rows": rows,
        "samples": {"images": 100, "prompts_sha256": "a" * 64, "seed": 0, "teacher_guidance_scale": 7.0} | samples,
        "teacher": {"weights_digest": "b" * 64},
        "real_images": 50,
        "real_images_from": "selection",
        "intervals": {"confidence": 0.95, "resamples": 1000},
        "lineage": [{"node": "select", "identity": "c" * 64}],
        "config": {"resize_px": None, "patch_px": 299, "perceptual": {"distance": "lpips"}, "clip_prefix": ""},
    }


def publish(store: ArtifactStore, folder: Path, content: dict[str, Any], name: str) -> Manifest[Any]:
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(content))
    lineage = Lineage(stage="evaluate", node="evaluate", revision=3, config={}, inputs={})
    return store.publish(folder, identity=digest(name), content=Evaluation(scores={}, prompts=1), lineage=lineage)


def test_rows_meet_by_family_and_steps() -> None:
    found = compare([Evaluated("a", report(FIRST)), Evaluated("b", report(SECOND))])
    lines = {(line.family, line.steps): line for line in found.lines}
    assert list(lines) == [("teacher", 8), ("lcm", 4), ("lcm", 2), ("dmd", 1)]
    assert (lines["lcm", 4].difference(1), lines["lcm", 4].overlap(1)) == (-2, False)
    assert (lines["teacher", 8].difference(1), lines["teacher", 8].overlap(1)) == (0, True)
    assert (lines["dmd", 1].difference(1), lines["dmd", 1].overlap(1)) == (None, None)
    assert found.warnings == ()


_intervals = st.tuples(st.floats(-50, 50), st.floats(0, 10), st.floats(0, 10)).map(lambda of: (of[0], of[0] - of[1], of[0] + of[2]))


@given(_intervals, _intervals)
def test_the_other_way_round_differences_change_sign_and_overlap_stays(first: Any, second: Any) -> None:
    runs = [Evaluated(name, report({("lcm", 4): figures})) for name, figures in (("a", first), ("b", second))]
    (there,), (back,) = compare(runs).lines, compare(runs[::-1]).lines
    difference, reverse = there.difference(1), back.difference(1)
    assert difference is not None and reverse is not None and difference == -reverse
    assert there.overlap(1) == back.overlap(1)
    inside = any(second[1] <= point <= second[2] for point in first) or any(first[1] <= point <= first[2] for point in second)
    assert there.overlap(1) == inside, "two intervals overlap exactly where one holds an end of the other"


def test_an_older_report_without_an_interval_is_compared_by_value_alone() -> None:
    with_transfers = [report(FIRST), report(FIRST)]
    row = {"family": "lcm", "steps": 4, "fid_teacher": 6.0}
    with_transfers[0]["transfers"] = [{"name": "ink", "rows": [row]}]
    with_transfers[1]["transfers"] = [{"name": "ink", "rows": [row | {"fid_teacher": 7.5, "interval": [7.0, 8.0]}]}]
    *_, line = compare([Evaluated(str(number), each) for number, each in enumerate(with_transfers)]).lines
    assert (line.family, line.figures) == ("lcm on ink", (Figure(6.0), Figure(7.5, 7.0, 8.0)))
    assert (line.difference(1), line.overlap(1)) == (1.5, None)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("extractor", "name"), "efficientnet-lite0", r"Not equal: the feature network \(a inception, b efficientnet-lite0\); no figure"),
        (("samples", "images"), 200, r"Not equal: the number of images \(a 100, b 200\)"),
        (("samples", "prompts_sha256"), "d" * 64, r"Not equal: the prompts \(a aaaaaaaaaaaa, b dddddddddddd\)"),
        (("samples", "seed"), 3, r"Not equal: the seed \(a 0, b 3\); rows were drawn from other noise"),
        (("real_images",), 60, r"Not equal: the real images \(a 50 of cccccccccccc, b 60 of cccccccccccc\)"),
        (("teacher", "weights_digest"), "e" * 64, r"Not equal: the teacher \("),
        (("config", "perceptual"), {"distance": "l2"}, r"Not equal: the perceptual distance \(a lpips, b l2\)"),
    ],
)
def test_other_settings_are_told(path: tuple[str, ...], value: Any, told: str) -> None:
    other = copy.deepcopy(report(FIRST))
    place = other
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (warning,) = compare([Evaluated("a", report(FIRST)), Evaluated("b", other)]).warnings
    assert re.match(told, warning)


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(BadInput, match="cannot be read"):
        read_report(path, "x")
    for content, told in (("[1]", "has no artifact, extractor"), ("{}", "has no artifact"), ("nothing", "cannot be read")):
        path.write_text(content)
        with pytest.raises(BadInput, match=f"x: report.json .*{told}"):
            read_report(tmp_path, "x")
    with pytest.raises(BadInput, match="expected at least two"):
        compare([Evaluated("a", report(FIRST))])


def test_the_command_takes_artifacts_recipes_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], restored_process: None
) -> None:
    store = ArtifactStore.open(f"file://{tmp_path / 'store'}")
    first, second = (publish(store, tmp_path / name, report(scores), name) for name, scores in (("first", FIRST), ("second", SECOND)))
    store.note_latest("nightly", "evaluate", second.identity)
    monkeypatch.setenv("DISTILL_STORE_ADDRESS", store.address)
    monkeypatch.setenv("COLUMNS", "200")

    def distill(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["compare", *arguments])
        assert isinstance(ended.value.code, int)
        written = capsys.readouterr()
        return ended.value.code, written.out, written.err

    page = tmp_path / "page.html"
    code, text, _ = distill(first.identity[:12], "latest:nightly", str(tmp_path / "first" / "report.json"), "--html", str(page))
    assert code == 0
    (line,) = [line for line in text.splitlines() if "lcm" in line and " 4 " in line]
    for cell in ("5.00 (4.00–6.00)", "3.00 (2.50–3.50)", "−2.00 apart", "±0.00 overlap"):
        assert cell in line
    html = page.read_text()
    assert html == render_comparison(
        compare(
            [
                Evaluated(first.identity[:12], report(FIRST)),
                Evaluated("latest:nightly", report(SECOND)),
                Evaluated(str(tmp_path / "first" / "report.json"), report(FIRST)),
            ]
        )
    )
    assert "<small>apart</small>" in html and not re.search(r"https?://|<script|<link|<img", html)
    code, text, _ = distill(first.identity, "latest:nightly", "--json")
    found = json.loads(text)["lines"][1]
    assert (found["differences"], found["intervals_overlap"], found["values"]) == ([-2.0], [False], [5.0, 3.0])
    for arguments, told in (
        ((first.identity[:12],), "expected at least two"),
        ((first.identity[:12], "latest:other"), "latest:other: no such file here; latest:other: no artifact"),
        ((first.identity[:12], "0" * 12), "no such artifact"),
    ):
        code, _, wrong = distill(*arguments)
        assert code == 2 and told in " ".join(wrong.split())
