"""Tables of any kind and make: read in bounded memory, rows dropped by what they say before anything is downloaded."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.data import ColumnMap, IngestConfig
from schemas.errors import BadInput
from stages.ingest.rules import RULES, MetadataFilter
from stages.ingest.seen import SeenTexts
from stages.ingest.stage import _chunks
from stages.ingest.table import ROW_SCHEMA, UrlTable


class TestTable:
    def rows(self, path: Path, columns: ColumnMap | None = None) -> list[dict[str, Any]]:
        return [row for batch in UrlTable(str(path), columns or ColumnMap()).batches() for row in batch.to_pylist()]

    def test_parquet_folder_in_the_order_of_names(self, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        pq.write_table(pa.table({"URL": ["http://x/2"], "TEXT": ["two"], "similarity": [0.3]}), tmp_path / "b" / "2.parquet")
        pq.write_table(pa.table({"url": ["http://x/1"], "caption": ["one"], "WIDTH": ["640"]}), tmp_path / "1.parquet")
        (tmp_path / ".hidden.parquet").write_text("rubbish")
        rows = self.rows(tmp_path)
        assert [(row["row"], row["url"], row["caption"], row["width"]) for row in rows] == [
            (0, "http://x/1", "one", 640.0),
            (1, "http://x/2", "two", None),
        ]

    def test_csv_with_line_breaks_and_captions_that_look_like_numbers(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_text('url,TEXT,width,height,aesthetic\nhttp://x/1,12,100,,5.5\nhttp://x/2,"two\nlines, one",,200,\n')
        rows = self.rows(tmp_path / "t.csv")
        assert [row["caption"] for row in rows] == ["12", "two\nlines, one"]
        assert [(row["width"], row["height"], row["aesthetic"]) for row in rows] == [(100.0, None, 5.5), (None, 200.0, None)]

    @pytest.mark.parametrize(
        "names",
        [
            {"URL": "url", "TEXT": "caption", "WIDTH": "width", "HEIGHT": "height", "similarity": "similarity", "punsafe": "unsafe",
             "pwatermark": "watermark", "AESTHETIC_SCORE": "aesthetic", "NSFW": "nsfw", "hash": None, "LICENSE": None},
            {"url": "url", "text": "caption", "width": "width", "height": "height", "clip_similarity_vitb32": "similarity",
             "clip_similarity_vitl14": None, "nsfw_score_opennsfw2": "unsafe", "watermark_score": "watermark",
             "aesthetic_score_laion_v2": "aesthetic", "num_faces": None, "image_phash": None},
        ],
        ids=["LAION-5B and LAION-Aesthetics", "COYO-700M"],
    )  # fmt: skip
    def test_columns_of_known_tables(self, tmp_path: Path, names: dict[str, str | None]) -> None:
        texts = {"url", "caption", "nsfw"}
        values = {name: str(number) if field in texts else float(number) for number, (name, field) in enumerate(names.items())}
        pq.write_table(pa.Table.from_pylist([values]), tmp_path / "t.parquet")
        (row,) = self.rows(tmp_path / "t.parquet")
        expected = {field: values[name] for name, field in names.items() if field is not None}
        assert row == dict.fromkeys(ROW_SCHEMA.names) | {"row": 0} | expected

    def test_a_recipe_names_only_what_is_new_and_an_empty_list_means_none(self, tmp_path: Path) -> None:
        columns = ColumnMap(caption=("blip", "Text"), aesthetic=())
        assert columns.caption == ("blip", "Text", "caption", "top_caption")
        assert columns.aesthetic == ()
        assert ColumnMap.model_validate(columns.model_dump()) == columns, "a configuration read again is the same"
        assert (columns.url, columns.identity_fields()["url"]) == (("url",), ["url"])
        pq.write_table(pa.table({"url": ["http://x"], "caption": ["alt"], "BLIP": ["made"], "aesthetic": [5.0]}), tmp_path / "t.parquet")
        (row,) = self.rows(tmp_path / "t.parquet", columns)
        assert (row["caption"], row["aesthetic"]) == ("made", None)

    def test_memory_holds_a_row_group_and_not_the_table(self, tmp_path: Path) -> None:
        group = pa.table({"url": [f"http://a/{number:060d}" for number in range(20_000)], "caption": ["a cat"] * 20_000})
        with pq.ParquetWriter(tmp_path / "t.parquet", group.schema, compression="none", use_dictionary=False) as writer:
            for _ in range(20):
                writer.write_table(group)
        before, most = pa.total_allocated_bytes(), 0
        for _ in UrlTable(str(tmp_path / "t.parquet"), ColumnMap()).batches():
            most = max(most, pa.total_allocated_bytes() - before)
        assert most < 0.5 * (tmp_path / "t.parquet").stat().st_size

    def test_a_reader_that_is_left_early_leaves_no_thread_at_work(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"url": ["http://a"] * 200_000, "caption": ["a"] * 200_000}), tmp_path / "t.parquet")
        before = threading.active_count()
        batches = UrlTable(str(tmp_path / "t.parquet"), ColumnMap()).batches()
        next(batches)
        batches.close()  # type: ignore[attr-defined]
        assert threading.active_count() == before

    def test_address_of_any_file_system(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"url": ["http://x/1"], "text": ["one"]}), tmp_path / "t.parquet")
        assert len(list(UrlTable(f"file://{tmp_path}/t.parquet", ColumnMap()).batches())) == 1

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (
                {"link": ["http://x"], "caption": ["a"]},
                r"no column for the url; found link, caption; expected one of url .*ingest\.columns\.url",
            ),
            (
                {"url": ["http://x"], "words": ["a"]},
                r"no column for the caption; found url, words; expected one of caption, text, top_caption",
            ),
            ({"url": [], "caption": []}, r"has no rows"),
            ({"url": ["http://x"], "caption": ["a"], "width": ["wide"]}, r"column width cannot be read as double"),
            ({"url": ["http://x"], "caption": ["a"], "punsafe": [[0.5]]}, r"column punsafe cannot be read as double"),
            ({"url": [{"a": 1}], "caption": ["a"]}, r"column url cannot be read as string"),
            (
                {"url": ["http://x"], "caption": ["a"], "NSFW": [0.5]},
                r"column NSFW holds double, expected labels .*ingest\.columns\.unsafe",
            ),
        ],
    )
    def test_a_table_that_cannot_serve_is_refused(self, tmp_path: Path, content: dict[str, Any], message: str) -> None:
        pq.write_table(pa.table(content), tmp_path / "t.parquet")
        with pytest.raises(BadInput, match=message):
            self.rows(tmp_path / "t.parquet")

    @pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.txt", "folder"])
    def test_what_is_no_table_is_refused(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        path.mkdir() if name == "folder" else path.write_bytes(b"\x00\xffrubbish")
        with pytest.raises(BadInput, match=str(path)):
            self.rows(path)

    def test_a_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match="nothing to read"):
            self.rows(tmp_path / "nowhere.parquet")


class TestMetadata:
    def kept(self, rows: list[dict[str, Any]], **config: Any) -> tuple[list[str], dict[str, int]]:
        metadata = MetadataFilter(IngestConfig(table="t", **config))
        full = [dict.fromkeys(ROW_SCHEMA.names) | {"caption": "a cat"} | row for row in rows]
        passing = metadata.passing(iter([pa.RecordBatch.from_pylist(full, ROW_SCHEMA)]))
        return [url for batch in passing for url in batch["url"].to_pylist()], metadata.counts()

    def test_bounds_are_strict_and_missing_figures_pass(self) -> None:
        rows = [
            {"url": "http://a/1", "width": 1024, "height": 2000},
            {"url": "http://a/2", "width": 1025, "height": 1025},
            {"url": "http://a/3", "width": 500},
            {"url": "http://a/4", "width": 0, "height": 0},
            {"url": "http://a/5", "aesthetic": 5.5},
            {"url": "http://a/6", "aesthetic": 5.51},
            {"url": "http://a/7", "aesthetic": float("nan")},
            {"url": "http://a/8"},
        ]
        urls, dropped = self.kept(rows)
        assert [url[-1] for url in urls] == ["2", "4", "6", "7", "8"]
        assert dropped == {"resolution": 2, "aesthetic": 1}
        assert len(self.kept(rows, min_aesthetic=None, min_side_px=0)[0]) == 8

    def test_scores_and_labels_that_the_table_states(self) -> None:
        rows = [
            {"url": "http://a/1", "watermark": 0.8}, {"url": "http://a/2", "watermark": 0.79}, {"url": "http://a/3", "unsafe": 0.5},
            {"url": "http://a/4", "unsafe": 0.49}, {"url": "http://a/5", "nsfw": " Nsfw "}, {"url": "http://a/6", "nsfw": "UNSURE"},
            {"url": "http://a/7", "similarity": 0.27}, {"url": "http://a/8", "similarity": 0.28}, {"url": "http://a/9", "unsafe": float("nan")},
        ]  # fmt: skip
        urls, dropped = self.kept(rows, min_similarity=0.28)
        assert [url[-1] for url in urls] == ["2", "4", "6", "8", "9"]
        assert dropped == {"watermark": 1, "unsafe": 1, "similarity": 1, "nsfw": 1}
        assert self.kept(rows, drop_nsfw=["unsure", "nsfw"], max_unsafe=None, max_watermark=None)[1] == {"nsfw": 2}
        assert len(self.kept(rows, drop_nsfw=[], max_unsafe=None, max_watermark=None)[0]) == len(rows)

    def test_a_row_is_counted_once_under_the_first_rule_that_hits(self) -> None:
        worst = {
            "url": "ftp://localhost",
            "caption": "",
            "width": 1,
            "aesthetic": 1,
            "watermark": 1,
            "unsafe": 1,
            "similarity": 0,
            "nsfw": "NSFW",
        }
        cures = [
            {"width": 2000}, {"aesthetic": 6}, {"watermark": 0}, {"unsafe": 0}, {"similarity": 1}, {"nsfw": "UNLIKELY"}, {"url": "http://localhost"},
            {"url": "http://a/1"}, {"caption": "a cat"},
        ]  # fmt: skip
        rows = [worst]
        for cure in cures:
            rows.append(rows[-1] | cure)
        urls, dropped = self.kept(rows, min_similarity=0.28)
        assert urls == ["http://a/1"]
        assert dropped == {name: 1 for name in RULES if name != "broken text"}

    def test_only_public_web_addresses(self) -> None:
        refused = [
            "http://localhost/a", "http://127.0.0.1/a", "https://10.1.2.3/a", "http://[::1]:80/a", "http://169.254.169.254/latest", "http://printer.local/",
            "http://user@192.168.0.1/a", "http://0.0.0.0/",
        ]  # fmt: skip
        no_web = ["ftp://example.org/a", "file:///etc/passwd", "example.org/a.png", "", None, "http://", "http://a b/c"]
        urls, dropped = self.kept([{"url": url} for url in ["HTTPS://Example.org/a", *refused, *no_web]])
        assert urls == ["HTTPS://Example.org/a"]
        assert dropped == {"no http url": len(no_web), "private address": len(refused)}
        assert len(self.kept([{"url": url} for url in refused], allow_private_addresses=True)[0]) == len(refused)

    def test_chunks_do_not_depend_on_batches(self) -> None:
        rows = pa.table({name: pa.array(range(23)).cast(ROW_SCHEMA.field(name).type) for name in ROW_SCHEMA.names}, schema=ROW_SCHEMA)
        for size in (1, 4, 7, 23, 50):
            cut = list(_chunks(iter(rows.to_batches(max_chunksize=size)), 7))
            assert [chunk.num_rows for chunk in cut] == [7, 7, 7, 2]
            assert pa.concat_tables(cut).equals(rows)


class TestSeen:
    def test_a_text_is_known_from_its_second_coming_on(self) -> None:
        generator = np.random.default_rng(0)
        numbers = generator.integers(0, 3000, 10_000)
        seen, before = SeenTexts(), set[int]()
        for start in range(0, len(numbers), 700):
            part = numbers[start : start + 700].tolist()
            expected = []
            for number in part:
                expected.append(number in before)
                before.add(number)
            assert seen.add(pa.array([f"http://a/{number}" for number in part])).to_pylist() == expected
        assert len(seen) == len(before)

    def test_eight_bytes_a_text_in_few_runs(self) -> None:
        seen = SeenTexts()
        for start in range(0, 100_000, 1000):
            seen.add(pa.array([f"http://a/{number}" for number in range(start, start + 1000)]))
        assert sum(run.nbytes for run in seen._runs) == 8 * len(seen) == 800_000
        assert len(seen._runs) <= 8


ANY_FLOAT = st.floats(allow_nan=True, allow_infinity=True, width=32) | st.none()
GOOD_URL = st.integers(0, 9).map("http://a.b/{}".format)
BAD_URL = st.sampled_from(["https://10.0.0.1/", "http://[::1", "ftp://a", "http://\u2460.1", "http://0x7f.1/"])
ANY_URL = st.one_of(GOOD_URL, GOOD_URL, BAD_URL, st.text(), st.none())
KINDS: dict[str, st.SearchStrategy[Any]] = {
    "floats": ANY_FLOAT,
    "integers": st.integers(-(2**31), 2**31 - 1) | st.none(),
    "booleans": st.booleans() | st.none(),
    "numbers as text": st.sampled_from(["1", "-0.5", "nan", "inf", "1e400"]) | st.none(),
    "texts": st.text(max_size=5) | st.none(),
    "octets": st.binary(max_size=5) | st.none(),
    "lists": st.lists(st.floats(), max_size=2) | st.none(),
    "nothing": st.none(),
    "dates": st.datetimes() | st.none(),
}


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    """Tables with any columns of ours, each of any type."""
    rows = draw(st.integers(0, 9))
    columns: dict[str, pa.Array] = {}
    for name in ROW_SCHEMA.names[1:]:
        usual = {"url": ANY_URL, "caption": st.text(max_size=5) | st.none(), "nsfw": st.sampled_from(["NSFW", "unsure", ""]) | st.none()}
        kind = draw(st.sampled_from(["usual"] * 30 + list(KINDS) + ["absent"]))
        if kind != "absent":
            values = usual.get(name, ANY_FLOAT) if kind == "usual" else KINDS[kind]
            columns[name] = pa.array(draw(st.lists(values, min_size=rows, max_size=rows)))
        if kind == "texts" and draw(st.booleans()):
            columns[name] = columns[name].cast(pa.string()).dictionary_encode()
    if draw(st.booleans()) and rows:
        octets = pa.array(draw(st.lists(st.binary(max_size=5), min_size=rows, max_size=rows)), pa.binary())
        columns[draw(st.sampled_from(["url", "caption", "nsfw"]))] = pa.StringArray.from_buffers(rows, *octets.buffers()[1:])
    return pa.table(columns) if columns else pa.table({"url": pa.array([], pa.string())})


OPTIONS = st.fixed_dictionaries(
    {
        "min_side_px": st.integers(0, 3),
        "min_aesthetic": st.none() | st.floats(-1, 1),
        "min_similarity": st.none() | st.floats(-1, 1),
        "max_watermark": st.none() | st.floats(0, 1),
        "allow_private_addresses": st.booleans(),
    }
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=tables(), options=OPTIONS)
def test_any_table_gives_verdicts_or_one_clear_refusal(table: pa.Table, options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(table, path)
    metadata = MetadataFilter(IngestConfig(table="t", **options))
    try:
        passed = list(metadata.passing(UrlTable(str(path), ColumnMap()).batches()))
    except BadInput as error:
        assert str(path) in str(error)
        return
    assert metadata.seen == table.num_rows == sum(batch.num_rows for batch in passed) + sum(metadata.counts().values())
    for row in (row for batch in passed for row in batch.to_pylist()):  # which reads every text
        assert row["url"].lower().startswith("http") and row["caption"].strip()
        sides = [side for side in (row["width"], row["height"]) if side is not None and side > 0]
        assert all(side > options["min_side_px"] for side in sides)
        if options["min_aesthetic"] is not None and row["aesthetic"] is not None:
            assert not row["aesthetic"] <= options["min_aesthetic"]
