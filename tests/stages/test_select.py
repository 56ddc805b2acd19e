"""`select`: who passes and why not, judged by measurements alone."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.store import ArtifactStore
from schemas.base import digest
from schemas.data import SelectConfig
from schemas.errors import RunFailed
from schemas.manifest import Manifest, Measurements, Selection
from stages.measure.pictures import MEASUREMENTS, THUMBNAILS
from stages.select import Inputs, run
from tests.workspaces import make_workspace, open_store

CONFIG = SelectConfig(min_side_px=64, min_aesthetic=5.5, min_sharpness=0.02)
GOOD: dict[str, Any] = {
    "width": 80, "height": 80, "aesthetic": 6.0, "similarity": 0.3, "watermark": 0.1, "unsafe": 0.01, "nsfw": "UNLIKELY",
    "sharpness": 0.5, "high_frequency": 0.5, "animated": False, "unreadable": None,
}  # fmt: skip
BROKEN = {"width": 0, "height": 0, "sharpness": None, "high_frequency": None, "phash": None, "unreadable": "broken image"}
CASES: list[tuple[str, dict[str, Any], str | None]] = [
    ("good", {}, None),
    ("short side on the bound", {"width": 64, "height": 800}, "resolution"),
    ("short side just above", {"width": 65, "height": 800}, None),
    ("score on the bound", {"aesthetic": 5.5}, "aesthetic"),
    ("score just above", {"aesthetic": 5.500001}, None),
    ("no score", {"aesthetic": None}, "no aesthetic score"),
    ("blurred", {"sharpness": 0.019}, "sharpness"),
    ("sharp on the bound", {"sharpness": 0.02}, None),
    ("cut short", BROKEN, "unreadable"),
    ("animated", {"animated": True}, "animated"),
]


def row(number: int, **fields: Any) -> dict[str, Any]:
    """The measurements of picture `number`: a good one but for `fields`."""
    made = {"key": f"{number:010d}", "url": f"http://example.org/{number}", "caption": f"picture number {number}"}
    return made | GOOD | {"sha256": digest(number), "phash": (number * 0x9E3779B97F4A7C15) % 2**64 - 2**63} | fields


def publish_measurements(folder: Path, store: ArtifactStore, rows: list[dict[str, Any]], *, shard_rows: int = 4) -> Manifest[Measurements]:
    """Publish rows of `MEASUREMENTS` as what `measure` makes."""
    workspace = make_workspace(folder, store, identity="measurements")
    with workspace.folder("measurements") as place:
        starts = range(0, len(rows), shard_rows)
        for shard, start in enumerate(starts):
            part = rows[start : start + shard_rows]
            pq.write_table(pa.Table.from_pylist(part, MEASUREMENTS), place / f"measurements-{shard:05d}.parquet")
            small = [{"key": one["key"], "thumbnail": None} for one in part]
            pq.write_table(pa.Table.from_pylist(small, THUMBNAILS), place / f"thumbnails-{shard:05d}.parquet")
        return workspace.publish(place, Measurements(source=digest("images"), images=len(rows), shards=len(starts)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("select")


@pytest.fixture(scope="module")
def store(folder: Path) -> ArtifactStore:
    return open_store(folder)


@pytest.fixture(scope="module")
def measurements(folder: Path, store: ArtifactStore) -> Manifest[Measurements]:
    return publish_measurements(folder, store, [row(number, caption=name, **fields) for number, (name, fields, _) in enumerate(CASES)])


@pytest.fixture(scope="module")
def selected(folder: Path, store: ArtifactStore, measurements: Manifest[Measurements]) -> Manifest[Selection]:
    return run(CONFIG, Inputs(measurements=measurements), make_workspace(folder, store, identity="selection"))


def test_exactly_the_right_ones_survive_and_every_drop_has_its_reason(store: ArtifactStore, selected: Manifest[Selection]) -> None:
    verdicts = pq.read_table(store.fetch(selected) / "verdicts.parquet").to_pylist()
    assert {row["caption"]: row["reason"] for row in verdicts} == {name: reason for name, _, reason in CASES}
    assert all(row["passed"] == (row["reason"] is None) for row in verdicts)
    passed = sum(reason is None for _, _, reason in CASES)
    assert selected.content.images == passed
    assert selected.content.images_in == len(CASES) == passed + sum(selected.content.dropped.values())


def test_none_left_is_a_failed_run_that_says_why(folder: Path, store: ArtifactStore, measurements: Manifest[Measurements]) -> None:
    config = CONFIG.model_copy(update={"min_side_px": 5000})
    with pytest.raises(RunFailed, match=r"none of 10 images passes: unreadable 1, animated 1, resolution 8"):
        run(config, Inputs(measurements=measurements), make_workspace(folder, store, identity="none"))
