"""`select`: who passes and why not, judged by measurements alone."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.demo.table import make_collection
from infra.store import ArtifactStore
from schemas.base import digest
from schemas.data import CaptionConfig, CaptionRules, MeasureConfig, SelectConfig
from schemas.errors import BadInput, RunFailed
from schemas.loading import load_recipe, read_recipe
from schemas.manifest import Manifest, Measurements, Selection
from stages import measure
from stages.measure.pictures import MEASUREMENTS
from stages.select import Inputs, run
from stages.select.criteria import REASONS, judge
from tests.stages.measured import publish_measurements, row
from tests.stages.pictures import hashes, publish_images, sample
from tests.workspaces import make_workspace, open_store

CONFIG = SelectConfig(
    min_side_px=64,
    min_aesthetic=5.5,
    min_sharpness=0.02,
    min_high_frequency=0.001,
    max_watermark=0.5,
    max_unsafe=0.5,
    min_similarity=0.2,
    max_hash_distance=2,
)
BROKEN = {"width": 0, "height": 0, "sharpness": None, "high_frequency": None, "phash": None, "unreadable": "broken image"}
SAME = {"phash": 0x5555, "sha256": digest("same")}
CASES: list[tuple[str, dict[str, Any], str | None]] = [
    ("nothing wrong with it", {}, None),
    ("short side on the bound", {"width": 64, "height": 800}, "resolution"),
    ("short side just above", {"width": 65, "height": 800}, None),
    ("score on the bound", {"aesthetic": 5.5}, "aesthetic"),
    ("score just above", {"aesthetic": 5.500001}, None),
    ("no score", {"aesthetic": None}, "no aesthetic score"),
    ("a score that is none", {"aesthetic": float("nan")}, "no aesthetic score"),
    ("blurred", {"sharpness": 0.019}, "sharpness"),
    ("sharp on the bound", {"sharpness": 0.02}, None),
    ("enlarged", {"high_frequency": 0.0009}, "upscaled"),
    ("detail on the bound", {"high_frequency": 0.001}, None),
    ("cut short", BROKEN, "unreadable"),
    ("animated", {"animated": True}, "animated"),
    ("watermark on the bound", {"watermark": 0.5}, "watermark"),
    ("watermark just below", {"watermark": 0.4999}, None),
    ("watermark not known", {"watermark": None}, None),
    ("unsafe on the bound", {"unsafe": 0.5}, "unsafe"),
    ("unsafe not known", {"unsafe": None}, None),
    ("labelled as not safe", {"nsfw": "NSFW"}, "nsfw"),
    ("labelled as unsure", {"nsfw": "UNSURE"}, None),
    ("not labelled", {"nsfw": None}, None),
    ("of another picture", {"similarity": 0.19}, "similarity"),
    ("similar on the bound", {"similarity": 0.2}, None),
    ("similarity not known", {"similarity": None}, None),
    ("IMG_1234.JPG | Flickr", {}, "caption empty"),
    ("a cat, 12 May 2011", {}, None),
    ("fox (1920x1080)", {}, "caption too short"),
    ("123 456 - 789", {}, "caption all numbers"),
    ("красная лодка", {}, "caption wrong script"),
    ("the file", SAME, None),
    ("the file again", SAME, "duplicate"),
    ("the file again, but a lower score", SAME | {"aesthetic": 5.0}, "aesthetic"),
    ("two bits away", {"phash": 0x5555 ^ 0b11}, "near duplicate"),
    ("three bits away", {"phash": 0x5555 ^ 0b10101 << 20}, None),
    ("near, and a worse one of it is before", {"phash": 0x7777_0000}, "near duplicate"),
    ("near, and the largest", {"phash": 0x7777_0001, "width": 90}, None),
    ("near to the largest, but blurred", {"phash": 0x7777_0001, "width": 99, "sharpness": 0.001}, "sharpness"),
    ("hash not known", {"phash": None}, None),
    ("hash not known either", {"phash": None}, None),
    ("all wrong at once", BROKEN | {"aesthetic": 1.0, "nsfw": "NSFW"}, "unreadable"),
]


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


def verdicts(store: ArtifactStore, selection: Manifest[Selection]) -> list[dict[str, Any]]:
    return pq.read_table(store.fetch(selection) / "verdicts.parquet").to_pylist()


def test_exactly_the_right_ones_survive_and_every_drop_has_its_reason(store: ArtifactStore, selected: Manifest[Selection]) -> None:
    rows = verdicts(store, selected)
    assert {row["raw_caption"]: row["reason"] for row in rows} == {name: reason for name, _, reason in CASES}
    assert [row["key"] for row in rows] == [f"{number:010d}" for number in range(len(CASES))]
    assert all(row["passed"] == (row["reason"] is None) for row in rows)
    passed = sum(reason is None for _, _, reason in CASES)
    assert selected.content.images == passed
    assert selected.content.images_in == len(CASES) == passed + sum(selected.content.dropped.values())
    assert list(selected.content.dropped) == list(REASONS), "every reason there is has been seen"


def test_captions_are_cleaned_and_kept_as_they_were(store: ArtifactStore, selected: Manifest[Selection]) -> None:
    cleaned = {row["raw_caption"]: row["caption"] for row in verdicts(store, selected)}
    assert cleaned["a cat, 12 May 2011"] == "a cat"
    assert cleaned["IMG_1234.JPG | Flickr"] == ""
    assert cleaned["nothing wrong with it"] == "nothing wrong with it"


def test_no_image_is_needed(store: ArtifactStore, measurements: Manifest[Measurements], selected: Manifest[Selection]) -> None:
    """The image shards that were measured are not on this store and never were."""
    assert store.find(measurements.content.source) is None
    assert selected.content.source == measurements.content.source


def first_failed(one: dict[str, Any], config: SelectConfig) -> str | None:
    """The criteria again, one row at a time."""

    def known(name: str) -> bool:
        return one[name] is not None and one[name] == one[name]

    tests = {
        "unreadable": one["unreadable"] is not None,
        "animated": one["animated"],
        "resolution": min(one["width"], one["height"]) <= config.min_side_px,
        "no aesthetic score": not known("aesthetic"),
        "aesthetic": known("aesthetic") and one["aesthetic"] <= (config.min_aesthetic or 0),
        "sharpness": known("sharpness") and one["sharpness"] < config.min_sharpness,
        "upscaled": known("high_frequency") and one["high_frequency"] < config.min_high_frequency,
        "watermark": known("watermark") and one["watermark"] >= (config.max_watermark or 0),
        "unsafe": known("unsafe") and one["unsafe"] >= (config.max_unsafe or 0),
        "nsfw": one["nsfw"] in config.drop_nsfw,
        "similarity": known("similarity") and one["similarity"] < (config.min_similarity or 0),
        "caption empty": one["caption"] == "",
        "caption too short": len(one["caption"]) < config.captions.min_characters,
    }
    return next((name for name, failed in tests.items() if failed), None)


def near(bound: float) -> st.SearchStrategy[float | None]:
    """Nothing, NaN, on the bound, and a little to either side."""
    return st.sampled_from([None, float("nan"), bound, np.nextafter(bound, -1), np.nextafter(bound, 2 * bound), 0.0, bound * 2])


@settings(max_examples=60)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "width": st.sampled_from([0, 63, 64, 65, 66]),
                "height": st.sampled_from([0, 64, 65, 900]),
                "aesthetic": near(5.5),
                "sharpness": near(0.02),
                "high_frequency": near(0.001),
                "watermark": near(0.5),
                "unsafe": near(0.5),
                "similarity": near(0.2),
                "nsfw": st.sampled_from([None, "UNLIKELY", "UNSURE", "NSFW"]),
                "animated": st.booleans(),
                "unreadable": st.sampled_from([None, None, "broken image"]),
                "caption": st.sampled_from(["", "cats", "a cat"]),
            }
        ),
        max_size=20,
    )
)
def test_verdicts_are_those_of_a_plain_loop(drawn: list[dict[str, Any]]) -> None:
    rows = [row(number, **fields) for number, fields in enumerate(drawn)]
    codes = judge(pa.Table.from_pylist(rows, MEASUREMENTS), CONFIG)
    assert [REASONS[code - 1] if code else None for code in codes] == [first_failed(one, CONFIG) for one in rows]


@pytest.mark.parametrize("batch_rows", [1, 7, 1000])
def test_batches_change_no_verdict(
    batch_rows: int, folder: Path, store: ArtifactStore, measurements: Manifest[Measurements], selected: Manifest[Selection]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.select.tables.batches.__defaults__", (batch_rows,))
        again = run(CONFIG, Inputs(measurements=measurements), make_workspace(folder, store, identity=f"by {batch_rows}"))
    assert str(verdicts(store, again)) == str(verdicts(store, selected)), "as text, where NaN is equal to itself"
    assert all(hashes(again)[path] == hashes(selected)[path] for path in ("report.json", "report.html"))


def test_the_same_again_is_the_same_bytes(
    folder: Path, store: ArtifactStore, measurements: Manifest[Measurements], selected: Manifest[Selection]
) -> None:
    again = run(CONFIG, Inputs(measurements=measurements), make_workspace(folder, store, identity="again"))
    assert hashes(again) == hashes(selected)


def test_shards_are_taken_in_the_order_of_their_numbers(folder: Path, store: ArtifactStore) -> None:
    """Of equal pictures the first stays, also where numbers have outgrown their zeros."""
    same = {"sha256": digest("one"), "phash": 1}
    numbers = [99_998, 99_999, 100_000]
    made = publish_measurements(folder, store, [row(number, **same) for number in range(3)], shard_rows=1, numbers=numbers, identity="many")
    chosen = run(CONFIG, Inputs(measurements=made), make_workspace(folder, store, identity="of many"))
    assert [row["passed"] for row in verdicts(store, chosen)] == [True, False, False]


def test_what_is_not_looked_at_drops_nobody(folder: Path, store: ArtifactStore, measurements: Manifest[Measurements]) -> None:
    off = CaptionRules(**dict.fromkeys(CaptionRules.model_fields, False))
    config = SelectConfig(
        min_side_px=0, min_aesthetic=None, min_sharpness=0, min_high_frequency=0, max_watermark=None, max_unsafe=None, drop_nsfw=(),
        max_hash_distance=None, captions=CaptionConfig(rules=off),
    )  # fmt: skip
    chosen = run(config, Inputs(measurements=measurements), make_workspace(folder, store, identity="all"))
    assert chosen.content.dropped == {"unreadable": 2, "animated": 1, "duplicate": 2}
    assert all(row["caption"] == row["raw_caption"] for row in verdicts(store, chosen))


def test_many_rows_in_any_order_keep_the_same_pictures(tmp_path: Path) -> None:
    """Of rows that differ in size, which stay does not depend on where they are."""
    store = open_store(tmp_path)
    rows = [row(number, phash=(number % 40) << 20, width=100 + number) for number in range(200)]
    kept = []
    for seed in range(3):
        shuffled = random.Random(seed).sample(rows, len(rows)) if seed else rows[::-1]
        made = publish_measurements(tmp_path, store, shuffled, shard_rows=30, identity=f"order {seed}")
        config = CONFIG.model_copy(update={"max_hash_distance": 0})
        chosen = run(config, Inputs(measurements=made), make_workspace(tmp_path, store, identity=f"of order {seed}"))
        kept.append(sorted(one["key"] for one in verdicts(store, chosen) if one["passed"]))
    assert kept[0] == kept[1] == kept[2] == [f"{number:010d}" for number in range(160, 200)]


def test_none_left_is_a_failed_run_that_says_why(folder: Path, store: ArtifactStore, measurements: Manifest[Measurements]) -> None:
    config = CONFIG.model_copy(update={"min_side_px": 5000})
    with pytest.raises(RunFailed, match=r"none of 40 images passes: unreadable 2, animated 1, resolution 37"):
        run(config, Inputs(measurements=measurements), make_workspace(folder, store, identity="none"))


def test_nothing_measured_is_a_failed_run_too(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    made = publish_measurements(tmp_path, store, [])
    with pytest.raises(RunFailed, match="none of 0 images passes"):
        run(CONFIG, Inputs(measurements=made), make_workspace(tmp_path, store, identity="none"))


@pytest.mark.slow
def test_of_the_demos_pictures_the_planted_ones_are_dropped_and_no_other(tmp_path: Path) -> None:
    """Drawings of above 1024 px, some of one concept in two poses, through `measure` and the tiny recipe's `select`."""
    collection = make_collection(tmp_path / "demo", large=12, small=4)
    known = {row["url"]: row for row in pq.read_table(collection.table).to_pylist()}
    files = {url: collection.pictures / url.rpartition("/")[2].partition("?")[0] for url in known}
    there = [(known[url], path.read_bytes()) for url, path in files.items() if path.is_file()]
    store = open_store(tmp_path)
    images = publish_images(tmp_path, store, [sample(number, data, **row) for number, (row, data) in enumerate(there)], shard_images=20)
    measured = measure.run(MeasureConfig(processes=1), measure.Inputs(images=images), make_workspace(tmp_path, store, identity="measured"))
    config = load_recipe(Path("recipes/tiny.yaml")).select
    chosen = run(config, Inputs(measurements=measured), make_workspace(tmp_path, store, identity="selection"))

    def expected(url: str) -> str | None:
        name, _, query = url.rpartition("/")[2].partition("?")
        if name.startswith(("truncated", "page")):
            return "unreadable"
        if name.startswith("claims") or (name[0].isdigit() and int(name[:5]) >= 12):
            return "resolution"
        if query == "low":
            return "aesthetic"
        if name.startswith("blurred"):
            return "sharpness"
        return "caption empty" if query == "silent" else None

    assert {row["url"]: row["reason"] for row in verdicts(store, chosen)} == {url: expected(url) for url in known if files[url].is_file()}
    assert chosen.content.images == 12


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("captions: {rules: {strip_all: true}}", "select.captions.rules.strip_all (line 6): found True; expected no such field here"),
        ("captions: {scripts: [Klingon]}", "select.captions.scripts.0 (line 6): found 'Klingon'"),
        ("captions: {scripts: []}", "select.captions.scripts (line 6): found []"),
        (
            "captions: {min_characters: 40, max_characters: 20}",
            "select.captions.min_characters (line 6): found 40; every caption would be too short: expected at most max_characters = 20",
        ),
        ("max_hash_distance: 9", "select.max_hash_distance (line 6): found 9"),
        ("drop_nsfw: [SAFE]", "select.drop_nsfw.0 (line 6): found 'SAFE'"),
        ("max_watermark: 2", "select.max_watermark (line 6): found 2"),
    ],
)
def test_mistakes_in_the_section(section: str, expected: str) -> None:
    text = f"name: small\ningest:\n  table: images.parquet\nteacher: {{source: teachers/tiny}}\nselect:\n  {section}\n"
    with pytest.raises(BadInput) as caught:
        read_recipe(text, [])
    assert expected in str(caught.value)


def test_a_similarity_that_no_column_gives_is_a_mistake() -> None:
    text = "name: small\ningest: {table: a.parquet, columns: {similarity: []}}\nteacher: {source: t}\nselect: {min_similarity: 0.2}\n"
    with pytest.raises(BadInput, match=r"select.min_similarity .*every picture would pass"):
        read_recipe(text, [])
