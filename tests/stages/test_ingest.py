"""`ingest` against a real web server that misbehaves, with the real img2dataset."""

import hashlib
import importlib.util
import json
import signal
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from PIL import Image

from schemas.data import IngestConfig
from schemas.errors import BadInput, RunFailed
from schemas.loading import parse_recipe
from schemas.manifest import ImageShards, Manifest
from stages.ingest import preflight
from stages.ingest.fetch import fetch_rows
from stages.shards import read_samples, shard_paths
from tests.services import ObjectStore
from tests.stages.killed import Job, parts_of, run, start
from tests.stages.pictures import encoded, hashes, noise
from tests.web import Site, cut_short, serve, slowly, status, with_headers
from tests.workspaces import open_store

GOOD = 20
CHUNK = 16
DROPPED = {
    "resolution": 1, "aesthetic": 1, "watermark": 1, "unsafe": 1, "nsfw": 1, "no http url": 1, "empty caption": 1, "broken text": 1,
    "duplicate url": 1,
}  # fmt: skip
FAILED = {
    "broken image": 1, "connection": 1, "file too large": 1, "http 404": 1, "http 500": 1, "not an image": 1, "refused by robots tag": 1,
    "timeout": 1, "too many pixels": 1, "unsupported format": 1,
}  # fmt: skip
PICTURELESS = ("broken image", "not an image", "too many pixels", "unsupported format")
"""Fetched well, and of no use."""


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
        {"URL": site.url("/d"), "TEXT": "stock photo", "pwatermark": 0.8},
        {"URL": site.url("/e"), "TEXT": "unsafe", "punsafe": 0.5},
        {"URL": site.url("/f"), "TEXT": "labelled", "NSFW": "nsfw"},
        {"URL": site.url("/g"), "TEXT": b"not \xff UTF-8"},
        {"URL": site.url("/1"), "TEXT": "again"},
    ]
    rows[3] |= {"similarity": 0.31, "pwatermark": 0.25, "punsafe": 0.125, "NSFW": "unlikely"}
    rows[4] |= {"similarity": float("nan"), "pwatermark": float("-inf"), "NSFW": ""}
    unscored = [{"URL": site.url("/0"), "TEXT": "no score", "WIDTH": 60, "HEIGHT": 70}]
    mixed = [row for pair in zip(rows[:10], bad, strict=True) for row in pair] + rows[10:] + dropped + unscored
    octets = pa.schema([field.with_type(pa.binary()) if field.name == "TEXT" else field for field in TABLE])
    broken = pa.Table.from_pylist(mixed, octets).to_batches()[0]
    text = pa.StringArray.from_buffers(len(mixed), *broken["TEXT"].buffers()[1:])  # as a careless writer leaves it
    pq.write_table(pa.table(broken.set_column(1, "TEXT", text)), folder / "table.parquet")
    config = IngestConfig(
        table="table.parquet", min_side_px=40, min_aesthetic=5.0, allow_private_addresses=True, timeout_seconds=2, retries=0, shard_images=8,
        max_file_bytes=200_000, chunk_rows=CHUNK, processes=1, threads=8,
    )  # fmt: skip
    return Job(
        stage="ingest", config=config.model_dump(mode="json"), outside={"table": str(folder / "table.parquet")}, folder=str(folder),
        identity="undisturbed",
    )  # fmt: skip


TABLE = pa.schema(
    [
        ("URL", pa.string()), ("TEXT", pa.string()), ("WIDTH", pa.int32()), ("HEIGHT", pa.int32()), ("AESTHETIC_SCORE", pa.float32()),
        ("similarity", pa.float64()), ("pwatermark", pa.float32()), ("punsafe", pa.float32()), ("NSFW", pa.string()),
    ]
)  # fmt: skip


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
    urls = pq.read_table(job.outside["table"], columns=["URL", "AESTHETIC_SCORE"]).to_pylist()
    captions = [
        text.decode() if b"\xff" not in text else "" for text in pq.read_table(job.outside["table"])["TEXT"].cast(pa.binary()).to_pylist()
    ]
    table = [row | {"TEXT": caption} for row, caption in zip(urls, captions, strict=True)]
    for one in samples:
        source = table[int(one.key)]
        page = site.pages["/" + source["URL"].rsplit("/", 1)[1]]
        assert one.image == page
        assert (one.row["url"], one.caption) == (source["URL"], source["TEXT"])
        number = int(source["URL"].rsplit("/", 1)[1])
        assert (one.row["width"], one.row["height"]) == (60 + number, 70)
        assert one.extension == ("jpg", "png", "webp")[number % 3]
        assert one.row["aesthetic"] == pytest.approx(source["AESTHETIC_SCORE"]) or source["AESTHETIC_SCORE"] is None
        assert one.row["sha256"] == hashlib.sha256(one.image).hexdigest()
    scores = {
        one.row["url"].rsplit("/", 1)[1]: [one.row[name] for name in ("similarity", "watermark", "unsafe", "nsfw")] for one in samples
    }
    assert scores["4"] == [0.31, 0.25, 0.125, "UNLIKELY"]
    assert scores["5"] == [None, None, None, None] == scores["1"]
    assert [len(list(read_samples(shard))) for shard in shard_paths(folder)] == [8, 8, 4], "full, whatever failed between them"
    with tarfile.open(shard_paths(folder)[0]) as tar:
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in tar} == {(0, 0, 0, "")}


@pytest.mark.slow
def test_img2datasets_statistics_are_kept_without_its_times(made: Manifest, job: Job) -> None:
    folder = open_store(Path(job.folder)).fetch(made, ["statistics.json"])
    statistics = json.loads((folder / "statistics.json").read_text())
    fetched = GOOD + len(PICTURELESS)
    told = {reason: count for reason, count in FAILED.items() if reason not in PICTURELESS} | {"success": fetched}
    told |= {"connection: broken": told.pop("connection")}
    assert statistics["img2dataset"] == {
        "count": GOOD + sum(FAILED.values()), "successes": fetched, "failed_to_download": sum(FAILED.values()) - len(PICTURELESS),
        "failed_to_resize": 0, "status_dict": told,
    }  # fmt: skip
    assert (statistics["rows_dropped"], statistics["failures"], statistics["images"]) == (DROPPED, FAILED, GOOD)
    assert [shard["images"] for shard in statistics["shards"]] == [8, 8, 4]
    samples = [one for shard in shard_paths(open_store(Path(job.folder)).fetch(made)) for one in read_samples(shard)]
    assert sum(shard["bytes"] for shard in statistics["shards"]) == sum(len(one.image) for one in samples)


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_chunks_processes_or_where_files_pass(made: Manifest, job: Job, tmp_path: Path) -> None:
    changes = {"chunk_rows": 11, "processes": 2, "threads": 1, "shared_folder": f"file://{tmp_path}/shared"}
    other = job.model_copy(update={"identity": "other", "config": job.config | changes})
    assert hashes(run(other)) == hashes(made)
    assert list((tmp_path / "shared").iterdir()) == []


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
    assert parts_of(killed) == ["chunk-0000000000-16"]
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
def test_the_downloader_refuses_private_addresses_in_its_own_processes(job: Job, site: Site, tmp_path: Path) -> None:
    site.asked.clear()
    config = IngestConfig.model_validate(job.config | {"allow_private_addresses": False})
    rows = pa.table({"row": [0, 1], "url": [site.url("/1"), f"http://localhost:{site.port}/2"]})
    groups, downloads = fetch_rows(rows, config, tmp_path)
    assert [one.failure for group in groups for one in group] == ["private address"] * 2
    assert downloads.status_dict == {"private address": 2}
    assert site.asked == []


@pytest.mark.parametrize("name", ["pyspark", "ray"])
def test_a_distributor_that_is_not_installed_is_refused_before_anything_runs(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == name else object())
    (tmp_path / "t.csv").write_text("url,caption,aesthetic\nhttp://a/1,a,6\n")
    recipe = parse_recipe({"name": "x", "ingest": {"table": "t.csv", "distributor": name}, "teacher": {"source": "x"}})
    with pytest.raises(BadInput, match=rf"ingest\.distributor = {name}: the package {name} is not installed.*pip install {name}"):
        preflight(recipe.ingest, {"table": str(tmp_path / "t.csv")}, recipe)


@pytest.mark.slow
def test_a_run_with_too_many_failures_stops_and_keeps_nothing(job: Job) -> None:
    table = pa.table({"url": [f"http://127.0.0.1:9/{i}" for i in range(3)], "caption": ["a", "b", "c"]})
    path = Path(job.folder) / "dead.parquet"
    pq.write_table(table, path)
    dead = job.model_copy(update={"identity": "dead", "outside": {"table": str(path)}})
    with pytest.raises(RunFailed, match=r"3 of 3 downloads failed, more than ingest.max_failed_fraction = 0.5: connection 3"):
        run(dead)
    assert parts_of(dead) == []


@pytest.mark.slow
@pytest.mark.service
def test_files_may_pass_through_an_object_store(
    job: Job, site: Site, tmp_path: Path, seaweedfs: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (seaweedfs.environment | {"AWS_ENDPOINT_URL": seaweedfs.endpoint}).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # another test's may have been made before these credentials were there
    rows = pa.table({"row": [0, 1], "url": [site.url("/1"), site.url("/nowhere")]})
    shared = f"s3://{seaweedfs.bucket}/passing/{tmp_path.name}"
    system = fsspec.filesystem("s3")
    system.pipe_file(f"{shared}/downloaded/00000.parquet", b"left by a run that was killed")
    groups, downloads = fetch_rows(rows, IngestConfig.model_validate(job.config), tmp_path, shared)
    assert {one.row: one.failure or one.read() for group in groups for one in group} == {0: site.pages["/1"], 1: "http 404"}
    assert downloads.count == 2
    assert system.glob(f"{shared}/**/*.*") == []
