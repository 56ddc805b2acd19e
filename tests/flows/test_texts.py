"""What pages say of what an artifact took."""

from pathlib import Path

from flows.texts import chain_page, cost_rows, failure_page, manifest_page
from schemas.manifest import Cost, ImageShards, Lineage, Manifest
from tests.workspaces import open_store

COST = Cost(
    wall_seconds=90, gpu_hours=0.2, peak_memory_bytes=2**30, peak_device_bytes=2**31, bytes_read=2048, bytes_written=3 * 2**20, attempts=2
)


def test_cost_is_on_the_pages_of_task_and_chain(tmp_path: Path) -> None:
    rows = {"time": "90.0 s in 2 attempts", "GPU hours": "0.2", "peak memory": "1.0 GiB, 2.0 GiB of a device"}
    rows["over the store"] = "2.0 KiB read, 3.0 MiB written"
    assert cost_rows(COST) == rows
    lineage = Lineage(stage="ingest", node="ingest", revision=1, config={}, inputs={}, cost=COST)
    manifest = Manifest(identity="a" * 64, content=ImageShards(rows_in_table=1, images=1, shards=1), files=(), lineage=lineage)
    store = open_store(tmp_path)
    page = manifest_page(manifest, store)
    assert all(f"| {name} | {value} |" in page for name, value in rows.items())
    assert "| 90.0 s | 0.2 | 2.0 KiB | 3.0 MiB | 1.0 GiB |" in chain_page("toy", {"ingest": manifest}, [], store)


def test_a_reason_is_folded_to_the_page_and_is_no_markup(tmp_path: Path) -> None:
    page = failure_page("toy", "encode", open_store(tmp_path), "pools.encode: found <b>'*'</b>\nexpected a_pool")
    assert "\n> pools.encode: found \\<b\\>'\\*'\\</b\\>\n>\n> expected a\\_pool\n" in page
    assert "distill stage encode RECIPE --store" in page
