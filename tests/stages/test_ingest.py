"""`ingest` against a real web server that misbehaves, with the real img2dataset."""

import signal
import tarfile
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.web import FetchError, FetchLimits, fetch, fetch_with_retries
from infra.web_addresses import is_private_host
from schemas.data import ColumnMap, IngestConfig
from schemas.errors import BadInput, RunFailed
from schemas.manifest import ImageShards, Manifest
from stages.ingest.rules import MetadataFilter
from stages.ingest.stage import _chunks
from stages.ingest.table import ROW_SCHEMA, UrlTable
from stages.shards import read_samples, shard_paths
from tests.stages.killed import Job, parts_of, run, start
from tests.stages.pictures import encoded, hashes, noise
from tests.web import Site, cut_short, serve, slowly, status, with_headers
from tests.workspaces import open_store

GOOD = 20
CHUNK = 16
DROPPED = {"no http url": 1, "empty caption": 1, "resolution": 1, "aesthetic": 1, "duplicate url": 1}
FAILED = {
    "broken image": 1, "connection": 1, "file too large": 1, "http 404": 1, "http 500": 1, "not an image": 1, "refused by robots tag": 1,
    "timeout": 1, "too many pixels": 1, "unsupported format": 1,
}  # fmt: skip


def bad_pages() -> dict[str, Any]:
    return {
        "/broken": encoded(noise(1, 64, 64))[:4000],
        "/cut": cut_short(encoded(noise(2, 64, 64))),
        "/large": encoded(noise(3, 300, 300)),
        "/error": status(500),
        "/html": b"<html>not found, says the page</html>",
        "/robots": with_headers(encoded(noise(4, 64, 64)), X_Robots_Tag="noai"),
        "/slow": slowly(encoded(noise(5, 64, 64)), 30),
        "/bomb": encoded(Image.new("1", (16_000, 16_000))),
        "/gif": encoded(noise(7, 64, 64), "GIF"),
    }


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    formats = ("JPEG", "PNG", "WEBP")
    pages: dict[str, Any] = {f"/{i}": encoded(noise(i, 60 + i, 70), formats[i % 3]) for i in range(GOOD)}
    with serve(Site(pages | bad_pages())) as served:
        yield served


@pytest.fixture(scope="module")
def job(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("ingest")
    rows: list[dict[str, Any]] = [{"URL": site.url(f"/{i}"), "TEXT": f"picture {i}", "AESTHETIC_SCORE": 5 + i / 10} for i in range(1, GOOD)]
    bad = [{"URL": site.url(path), "TEXT": path, "AESTHETIC_SCORE": 7.0} for path in (*bad_pages(), "/nowhere")]
    dropped = [
        {"URL": "ftp://example.org/a.png", "TEXT": "not the web"},
        {"URL": site.url("/a"), "TEXT": " \u00a0\n"},
        {"URL": site.url("/b"), "TEXT": "small", "WIDTH": 2000, "HEIGHT": 40},
        {"URL": site.url("/c"), "TEXT": "ugly", "AESTHETIC_SCORE": 5.0},
        {"URL": site.url("/1"), "TEXT": "again"},
    ]
    unscored = [{"URL": site.url("/0"), "TEXT": "no score", "WIDTH": 60, "HEIGHT": 70}]
    mixed = [row for pair in zip(rows[:10], bad, strict=True) for row in pair] + rows[10:] + dropped + unscored
    pq.write_table(pa.Table.from_pylist(mixed, TABLE), folder / "table.parquet")
    config = IngestConfig(
        table="table.parquet", min_side_px=40, min_aesthetic=5.0, allow_private_addresses=True, timeout_seconds=2, retries=0, shard_images=8,
        max_file_bytes=200_000, processes=1, threads=8,
    )  # fmt: skip
    patches = {"stages.ingest.stage:ROWS_PER_CHUNK": CHUNK}
    return Job(
        stage="ingest", config=config.model_dump(mode="json"), outside={"table": str(folder / "table.parquet")}, folder=str(folder),
        identity="undisturbed", patches=patches,
    )  # fmt: skip


TABLE = pa.schema(
    [("URL", pa.string()), ("TEXT", pa.string()), ("WIDTH", pa.int32()), ("HEIGHT", pa.int32()), ("AESTHETIC_SCORE", pa.float32())]
)


@pytest.fixture(scope="module")
def made(job: Job) -> Manifest:
    return run(job)


@pytest.mark.slow
def test_every_row_is_accounted_for(made: Manifest, job: Job) -> None:
    content = made.content
    assert isinstance(content, ImageShards)
    assert content.rows_dropped == DROPPED
    assert content.failures == FAILED
    assert content.images == GOOD
    assert content.rows_in_table == content.images + sum(FAILED.values()) + sum(DROPPED.values())
    folder = open_store(Path(job.folder)).fetch(made)
    assert pq.read_metadata(folder / "rows.parquet").num_rows == content.images + sum(FAILED.values())
    failures = pq.read_table(folder / "failures.parquet").to_pylist()
    assert {row["url"].rsplit("/", 1)[1]: row["reason"] for row in failures} == {
        "broken": "broken image", "cut": "connection", "large": "file too large", "error": "http 500", "html": "not an image",
        "robots": "refused by robots tag", "slow": "timeout", "bomb": "too many pixels", "gif": "unsupported format", "nowhere": "http 404",
    }  # fmt: skip


@pytest.mark.slow
def test_shards_hold_the_original_bytes_in_the_order_of_the_table(made: Manifest, job: Job, site: Site) -> None:
    folder = open_store(Path(job.folder)).fetch(made)
    samples = [one for shard in shard_paths(folder) for one in read_samples(shard)]
    assert [one.key for one in samples] == sorted(one.key for one in samples)
    table = pq.read_table(job.outside["table"]).to_pylist()
    for one in samples:
        source = table[int(one.key)]
        page = site.pages["/" + source["URL"].rsplit("/", 1)[1]]
        assert one.image == page
        assert (one.row["url"], one.caption) == (source["URL"], source["TEXT"])
        number = int(source["URL"].rsplit("/", 1)[1])
        assert (one.row["width"], one.row["height"]) == (60 + number, 70)
        assert one.extension == ("jpg", "png", "webp")[number % 3]
        assert one.row["aesthetic"] == pytest.approx(source["AESTHETIC_SCORE"]) or source["AESTHETIC_SCORE"] is None
    with tarfile.open(shard_paths(folder)[0]) as tar:
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in tar} == {(0, 0, 0, "")}


@pytest.mark.slow
def test_killed_in_the_second_chunk_it_ends_with_the_same_bytes_and_leaves_no_process(made: Manifest, job: Job, site: Site) -> None:
    killed = job.model_copy(update={"identity": "killed", "config": job.config | {"processes": 2, "threads": 1}})
    site.asked.clear()
    process = start(killed)
    deadline = time.monotonic() + 120
    while not (parts_of(killed) and any(downloaders(job.folder))):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert parts_of(killed) == ["chunk-00000"]
    while any(downloaders(job.folder)):
        assert time.monotonic() < deadline, "the downloader outlived its parent"
        time.sleep(0.05)

    site.asked.clear()
    again = run(killed)
    assert hashes(again) == hashes(made)
    assert "/1" not in site.asked, "the finished chunk was fetched again"


def downloaders(folder: str) -> list[int]:
    """Processes that work below `folder`, other than ours and the stage's own."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:  # it ended meanwhile
            continue
        if "downloader.py" in command and folder in command:
            found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_a_run_with_too_many_failures_stops_and_keeps_nothing(job: Job) -> None:
    table = pa.table({"url": [f"http://127.0.0.1:9/{i}" for i in range(3)], "caption": ["a", "b", "c"]})
    path = Path(job.folder) / "dead.parquet"
    pq.write_table(table, path)
    dead = job.model_copy(update={"identity": "dead", "outside": {"table": str(path)}})
    with pytest.raises(RunFailed, match=r"3 of 3 downloads failed, more than ingest.max_failed_fraction = 0.5: connection 3"):
        run(dead)
    assert parts_of(dead) == []


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

    def test_a_host_that_cannot_be_parsed_is_no_public_one(self) -> None:
        assert is_private_host("http://[::1/a")

    def test_chunks_do_not_depend_on_batches(self) -> None:
        rows = pa.table({name: pa.array(range(23)).cast(ROW_SCHEMA.field(name).type) for name in ROW_SCHEMA.names}, schema=ROW_SCHEMA)
        for size in (1, 4, 7, 23, 50):
            cut = list(_chunks(iter(rows.to_batches(max_chunksize=size)), 7))
            assert [chunk.num_rows for chunk in cut] == [7, 7, 7, 2]
            assert pa.concat_tables(cut).equals(rows)


class TestFetch:
    limits = FetchLimits(timeout=2, max_bytes=1000, allow_private=True)

    def test_redirects_and_names_into_private_networks_are_refused_before_a_byte_is_sent(self, site: Site) -> None:
        site.asked.clear()
        for host in ("127.0.0.1", "localhost"):
            with pytest.raises(FetchError, match="private address"):
                fetch(f"http://{host}:{site.port}/html", FetchLimits(timeout=2, max_bytes=1000))
        assert site.asked == []

    def test_redirects_are_followed_to_the_web_only(self, site: Site) -> None:
        site.pages |= {
            "/away": status(302, Location="/html"),
            "/out": status(302, Location="file:///etc/passwd"),
            "/round": status(302, Location="/round"),
        }
        assert fetch(site.url("/away"), self.limits) == site.pages["/html"]
        for path in ("/out", "/round"):
            with pytest.raises(FetchError, match="http 302"):
                fetch(site.url(path), self.limits)

    def test_what_may_pass_is_tried_again_and_what_cannot_is_not(self, site: Site) -> None:
        answers = iter([status(503), status(503), with_headers(b"at last")])

        def busy(request: BaseHTTPRequestHandler) -> None:
            next(answers)(request)

        site.pages["/busy"] = busy
        assert fetch_with_retries(site.url("/busy"), self.limits, retries=2) == b"at last"
        site.asked.clear()
        with pytest.raises(FetchError, match="http 404"):
            fetch_with_retries(site.url("/gone"), self.limits, retries=3)
        assert site.asked == ["/gone"]

    def test_a_page_that_never_ends_is_cut_at_the_limit(self, site: Site) -> None:
        site.pages["/endless"] = with_headers(b"x" * 5000)
        with pytest.raises(FetchError, match="file too large"):
            fetch(site.url("/endless"), self.limits)

    @pytest.mark.parametrize(
        ("url", "reason"), [("http://name.invalid/", "dns"), ("http://127.0.0.1:9/", "connection: refused"), ("http://a b/", "bad url")]
    )
    def test_reasons(self, url: str, reason: str) -> None:
        with pytest.raises(FetchError, match=f"^{reason}$"):
            fetch(url, self.limits)
