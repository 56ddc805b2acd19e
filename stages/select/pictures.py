"""Thumbnails by their place, read one row group at a time from the few files that hold them."""

from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np
import pyarrow.parquet as pq

from schemas.manifest import Manifest, Measurements
from stages.reports.page import data_uri
from stages.select.tables import table_paths
from stages.workspace import Workspace

Spot = tuple[int, int]
"""Number of the shard, and position in it."""
_KINDS: Final = {b"\xff\xd8": "jpeg", b"\x89P": "png", b"RI": "webp"}


def thumbnails(measurements: Manifest[Measurements], spots: Iterable[Spot], workspace: Workspace) -> Mapping[Spot, str]:
    """Data URIs of the thumbnails at these spots, as far as there are any. Only the files that hold them are fetched."""
    listed = [entry.path for entry in measurements.files if entry.path.startswith("thumbnails-")]
    names = [path.name for path in table_paths(workspace.scratch, listed)]
    wanted: dict[int, set[int]] = {}
    for shard, place in spots:
        if shard < len(names):
            wanted.setdefault(shard, set()).add(place)
    if not wanted:
        return {}
    folder = workspace.fetch(measurements, [names[shard] for shard in sorted(wanted)])
    found: dict[Spot, str] = {}
    for shard, places in wanted.items():
        with pq.ParquetFile(folder / names[shard]) as table:
            sizes = [table.metadata.row_group(group).num_rows for group in range(table.metadata.num_row_groups)]
            ends = np.cumsum(sizes)
            for place in places:
                group = int(np.searchsorted(ends, place, side="right"))
                column = table.read_row_group(group, columns=["thumbnail"])["thumbnail"]
                picture: bytes | None = column[place - (int(ends[group]) - sizes[group])].as_py()
                if picture is not None and picture[:2] in _KINDS:
                    found[shard, place] = data_uri(picture, _KINDS[picture[:2]])
    return found
