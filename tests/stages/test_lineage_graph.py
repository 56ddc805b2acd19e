"""What a result follows from, and its drawing."""

import re
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.base import digest
from schemas.manifest import Cost, ImageShards, Lineage, Manifest, Measurements
from stages.reports.ancestry import ancestors, lineage_row, outside
from stages.reports.cost import cost_table, duration
from stages.reports.graph import lineage_graph


def made(node: str, **inputs: str) -> Manifest[Any]:
    content = (
        ImageShards(rows_in_table=1, images=1, shards=1) if node == "ingest" else Measurements(source=digest("ingest"), images=1, shards=1)
    )
    lineage = Lineage(stage=node, node=node, revision=1, config={}, inputs=inputs)
    return Manifest(identity=digest(node), content=content, files=(), lineage=lineage)


def row(number: int, reads: set[int]) -> dict[str, Any]:
    inputs = {f"input-{other}": digest(other) for other in sorted(reads)}
    return {"node": f"n{number}", "kind": "latents", "identity": digest(number), "stage": "s", "revision": 1, "inputs": inputs}


def test_ancestors_are_followed_through_the_store_each_after_what_it_reads() -> None:
    table = digest("the table")
    ingest = made("ingest", table=table)
    measure = made("measure", images=ingest.identity)
    select = made("select", images=ingest.identity, measurements=measure.identity)
    store = {manifest.identity: manifest for manifest in (ingest, measure)}
    found = ancestors([ingest, select], store.get)
    assert [manifest.lineage.node for manifest in found] == ["ingest", "measure", "select"]
    assert outside(list(map(lineage_row, found))) == [(table, "table")]
    lost = ancestors([select], {}.get)
    assert [manifest.lineage.node for manifest in lost] == ["select"], "what is gone ends its line"
    assert [name for _, name in outside(list(map(lineage_row, lost)))] == ["images", "measurements"]


@settings(max_examples=60)
@given(st.lists(st.sets(st.integers(-2, 7)), min_size=1, max_size=8))
def test_every_box_is_below_what_it_reads_and_none_covers_another(reads: list[set[int]]) -> None:
    """Negative numbers are files from elsewhere."""
    rows = [row(number, {other for other in sources if other < number}) for number, sources in enumerate(reads)]
    svg = lineage_graph(rows)
    found = re.findall(r'<title>[^<]*?([0-9a-f]{64})</title><rect class="\w+" x="([-0-9.]+)" y="([-0-9.]+)" width="([0-9.]+)"', svg)
    boxes = {identity: (float(x), float(y), float(width)) for identity, x, y, width in found}
    assert set(boxes) == {row["identity"] for row in rows} | {identity for identity, _ in outside(rows)}
    for each in rows:
        assert all(boxes[source][1] < boxes[each["identity"]][1] for source in each["inputs"].values())
    for (x, y, width), (other_x, other_y, _) in pairwise(sorted(boxes.values(), key=lambda box: (box[1], box[0]))):
        assert other_y > y or other_x >= x + width
    whole = float(re.search(r'viewBox="0 0 (\d+)', svg).group(1))  # type: ignore[union-attr]
    assert all(x >= 0 and x + width <= whole for x, _, width in boxes.values())


def test_a_line_that_longer_ways_say_is_left_out() -> None:
    rows = [row(0, set()), row(1, {0}), row(2, {0, 1})]
    assert lineage_graph(rows).count("<path") == 2
    assert lineage_graph([row(0, set()), row(1, {0}), row(2, {0})]).count("<path") == 2
    assert lineage_graph([]) == ""


def test_costs_have_columns_where_there_is_something_to_say() -> None:
    table = cost_table({"a": Cost(wall_seconds=50, peak_memory_bytes=3 * 10**9), "b": Cost(wall_seconds=70)})
    assert table.titles == ("time", "host memory")
    assert table.cells == {"a": ("50 s", "3.0 GB"), "b": ("1 min 10 s", "0 bytes")}
    assert table.total == ("2 min 0 s", "")
    assert cost_table({}).titles == ()
    assert [duration(seconds) for seconds in (0.26, 59.4, 3600, 30_000)] == ["0.3 s", "59 s", "1 h 0 min", "8 h 20 min"]
