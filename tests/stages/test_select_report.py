"""The selection's report: what it says is what the verdicts say, and it asks nothing of any server."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from infra.store import ArtifactStore
from schemas.data import SelectConfig
from schemas.manifest import Manifest, Measurements, Selection
from stages.reports.charts import histogram
from stages.select import Inputs, calibration, run
from stages.select.survey import AXES, NEAREST, SAMPLED_SHARDS, sampled_shards
from tests.stages.measured import publish_measurements
from tests.stages.measured import row as made_row
from tests.workspaces import make_workspace, open_store

CONFIG = SelectConfig(min_side_px=64, min_sharpness=0.02, max_hash_distance=0)
_VOID = {"meta", "img", "link", "br", "line", "rect"}


class Page(HTMLParser):
    """What a page asks for, and whether it is well formed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.pictures: list[bytes] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data"):
                self.links.append(value or "")
            if name == "src" and tag == "img":
                self.pictures.append(base64.b64decode((value or "").partition(",")[2]))

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Nothing to close."""

    def handle_data(self, data: str) -> None:
        self.text += data


def rows_of(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        fields: dict[str, Any] = {
            "aesthetic": float(rng.normal(6, 0.5)),
            "sharpness": float(rng.lognormal(-3, 1)),
            "width": int(rng.integers(40, 200)),
        }
        fields |= {"unsafe": float(rng.beta(1, 5)), "watermark": None, "similarity": None}
        fields["caption"] = f"<script>alert({number})</script> a &amp;lt;b&gt; cat number {number}"
        rows.append(made_row(number, **fields))
    rows[0] |= {"aesthetic": 7.0, "sharpness": 0.2, "width": 150, "unsafe": 0.01}
    rows[7] |= {"sha256": rows[0]["sha256"], **{name: rows[0][name] for name in ("phash", "width", "aesthetic", "sharpness", "unsafe")}}
    return rows


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    return open_store(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def measurements(tmp_path_factory: pytest.TempPathFactory, store: ArtifactStore) -> Manifest[Measurements]:
    return publish_measurements(tmp_path_factory.mktemp("measured"), store, rows_of(300), shard_rows=25, thumbnails=True)


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory, store: ArtifactStore, measurements: Manifest[Measurements]) -> Manifest[Selection]:
    return run(CONFIG, Inputs(measurements=measurements), make_workspace(tmp_path_factory.mktemp("work"), store, identity="selection"))


@pytest.fixture(scope="module")
def report(store: ArtifactStore, selected: Manifest[Selection]) -> dict[str, Any]:
    return json.loads((store.fetch(selected) / "report.json").read_text())


@pytest.fixture(scope="module")
def page(store: ArtifactStore, selected: Manifest[Selection]) -> Page:
    return Page((store.fetch(selected) / "report.html").read_text())


def test_the_figures_are_those_of_the_verdicts(store: ArtifactStore, selected: Manifest[Selection], report: dict[str, Any]) -> None:
    rows = pq.read_table(store.fetch(selected) / "verdicts.parquet").to_pylist()
    assert (report["rows"], report["passed"], report["dropped"]) == (300, selected.content.images, selected.content.dropped)
    sharpness = report["criteria"]["sharpness"]
    assert sharpness["fails"] == sum(row["sharpness"] < 0.02 for row in rows) > sharpness["dropped"] > 0
    assert sum(sharpness["counts"]) == sharpness["measured"] == 300
    bin_ = int(np.argmax(sharpness["counts"]))
    low, high = sharpness["edges"][bin_ : bin_ + 2]
    assert sum(low <= row["sharpness"] < high for row in rows) == pytest.approx(sharpness["counts"][bin_], abs=1)  # its edges are rounded
    assert report["criteria"]["watermark"]["measured"] == 0
    assert report["captions"]["changed"]["unescape_html"] == 300
    assert report["doubles"] == [{"dropped_row": 7, "kept_row": 0, "bits": 0}]


@pytest.mark.parametrize("reason", [reason for reason, axis in AXES.items() if axis.pictures])
def test_the_nearest_on_either_side(reason: str, store: ArtifactStore, selected: Manifest[Selection], report: dict[str, Any]) -> None:
    rows = pq.read_table(store.fetch(selected) / "verdicts.parquet").to_pylist()
    values = {"resolution": lambda row: min(row["width"], row["height"]), "upscaled": lambda row: row["high_frequency"]}
    value = values.get(reason, lambda row: row[reason])
    order = list(AXES)
    came = [row for row in rows if row["reason"] not in order[: order.index(reason)] and value(row) is not None]
    criterion = report["criteria"][reason]
    if criterion["threshold"] is None:
        assert criterion["passing"] == criterion["failing"] == []
        return
    for side in ("failing", "passing"):
        wanted = [row for row in came if (row["reason"] == reason) == (side == "failing")]
        nearest = sorted(wanted, key=lambda row: (abs(value(row) - criterion["threshold"]), row["key"]))[:NEAREST]
        assert criterion[side] == [{"key": row["key"], "value": value(row)} for row in nearest]


def test_thumbnails_are_those_of_the_samples(page: Page, report: dict[str, Any]) -> None:
    keys = {sample["key"] for criterion in report["criteria"].values() for side in ("passing", "failing") for sample in criterion[side]}
    keys |= {f"{row:010d}" for pair in report["doubles"] for row in (pair["dropped_row"], pair["kept_row"])}
    assert {picture.removeprefix(b"\xff\xd8").decode() for picture in page.pictures} == keys
    assert len(keys) > 20


def test_the_page_is_whole_and_asks_nothing_of_any_server(store: ArtifactStore, selected: Manifest[Selection], page: Page) -> None:
    text = (store.fetch(selected) / "report.html").read_text()
    assert page.open == []
    assert all(link.startswith("data:image/") for link in page.links)
    assert not re.search(r"url\(|@import|<script|https?://", text)
    assert "<script>alert(0)</script>" in page.text, "captions are shown as text"
    assert "prefers-color-scheme: dark" in text
    assert "The table says nothing of: watermark" in page.text
    assert str(store.address) not in text


def test_of_many_shards_only_some_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    made = publish_measurements(tmp_path, store, rows_of(300), shard_rows=3, thumbnails=True)
    fetched: list[str] = []
    fetch = ArtifactStore.fetch
    monkeypatch.setattr(
        ArtifactStore, "fetch", lambda self, manifest, paths=None: fetched.extend(paths or ()) or fetch(self, manifest, paths)
    )
    run(
        CONFIG.model_copy(update={"max_hash_distance": None}),
        Inputs(measurements=made),
        make_workspace(tmp_path, store, identity="of many"),
    )
    thumbnails = [path for path in fetched if path.startswith("thumbnails-")]
    assert 0 < len(thumbnails) <= SAMPLED_SHARDS + 2, "two of the one pair of equal files"
    assert len(sampled_shards(100)) == SAMPLED_SHARDS
    assert list(sampled_shards(3)) == [0, 1, 2]


def test_without_thumbnails_there_is_a_page_all_the_same(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    made = publish_measurements(tmp_path, store, rows_of(30))
    chosen = run(CONFIG, Inputs(measurements=made), make_workspace(tmp_path, store, identity="bare"))
    assert Page((store.fetch(chosen) / "report.html").read_text()).pictures == []


def test_the_calibration_is_shown_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "files", lambda _package: tmp_path)
    assert calibration.calibration(0.02, 0.004) is None
    curve: dict[str, Any] = {"x_label": "strength", "series": [{"name": "Gaussian", "points": [[0, 0.1], [1, 0.05], [2, 0.0]]}]}
    at_default = {"recall": 0.99, "precision": 0.98, "caught": 0.97}
    whole = curve | {"note": "of 12 photographs", "high_frequency": curve, "at_default": at_default}
    (tmp_path / "sharpness_curve.json").write_text(json.dumps(whole))
    shown = calibration.calibration(0.02, 0.0)
    assert shown is not None
    assert (shown["note"], shown["at_default"]) == ("of 12 photographs", at_default)
    assert [[name for name, _ in chart["legend"]] for chart in shown["charts"]] == [["Gaussian", "threshold"], ["Gaussian"]]
    assert [chart["svg"].count("<polyline") for chart in shown["charts"]] == [2, 1]


class TestHistogram:
    def test_the_failing_side_and_the_threshold_are_marked(self) -> None:
        drawn = histogram([1, 2, 3, 0], [0, 1, 2, 3, 4], title="t", x_label="x", threshold=1.0)
        assert drawn.count('class="column fails"') == 1
        assert drawn.count('class="column"') == 2
        assert drawn.count('class="threshold"') == 1
        other = histogram([1, 2, 3, 0], [0, 1, 2, 3, 4], title="t", x_label="x", threshold=1.0, low_passes=True)
        assert other.count('class="column fails"') == 2

    def test_nothing_counted_is_nothing_drawn(self) -> None:
        assert histogram([0, 0], [0, 1, 2], title="t", x_label="x") == ""

    @pytest.mark.parametrize("threshold", [None, 0.0, 1e-9, 0.3, 1e9])
    @pytest.mark.parametrize("place", [0, 5, 9])
    def test_any_threshold_and_any_place_stay_on_the_drawing(self, threshold: float | None, place: int) -> None:
        counts = [0] * 10
        counts[place] = 123_456
        drawn = histogram(counts, np.geomspace(1e-4, 10, 11).tolist(), title="t", x_label="x", threshold=threshold, log_x=True)
        xs = [float(x) for x in re.findall(r' x1?="(-?[\d.]+)"', drawn)]
        assert all(0 <= x <= 420 for x in xs)
        assert drawn.count("<rect") == 1
