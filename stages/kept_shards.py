"""Shards that are made one by one, by any process and in any order, kept as they are finished, and made an artifact at the end.

Each is a part of the name `NAME` that holds `NAME.safetensors` and its rows of the index.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.manifest import C, Manifest
from stages.workspace import Workspace

INDEX: Final = "index.parquet"


def shards_left(names: Sequence[str], workspace: Workspace) -> list[int]:
    """Numbers of the shards that no run has kept yet."""
    done = {part.name for part in workspace.parts()}
    return [number for number, name in enumerate(names) if name not in done]


def processes_for_shards(left: Sequence[int], asked: int, devices: Sequence[str], device: str) -> int:
    """Processes that make the shards that are left: no more than were asked for, than there are shards, and on GPUs than there are devices."""
    return min(len(left), asked, len(devices) if device.startswith("cuda") else asked)


def publish_shards(content: C, names: Sequence[str], schema: pa.Schema, folder: Path, workspace: Workspace) -> Manifest[C]:
    """Join the shards' indices in `folder`, and make the artifact of what lies there and of the kept shards."""
    parts = {part.name: part for part in workspace.parts()}
    with pq.ParquetWriter(folder / INDEX, schema) as index:
        for name in names:
            with workspace.folder("part") as place:
                index.write_table(pq.read_table(workspace.load_part(parts[name], place, [INDEX]) / INDEX))
    return workspace.publish(folder, content, {f"{name}.safetensors": (parts[name], f"{name}.safetensors") for name in names})
