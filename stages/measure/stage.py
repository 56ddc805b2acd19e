"""The stage `measure`: a map over image shards; each one's table is kept as soon as it is made."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.outside import local_copy
from schemas.base import Model
from schemas.data import MeasureConfig
from schemas.errors import BadInput
from schemas.manifest import ImageShards, Manifest, Measurements
from schemas.recipe import Recipe
from stages.measure.pictures import MEASUREMENTS, measure_shard
from stages.parallel import map_processes
from stages.shards import index_shard, shard_paths
from stages.workspace import Workspace

THUMBNAILS_PER_GROUP: Final = 64
"""Rows of a row group, so that one thumbnail can be read without its whole file."""
_SCORE_BATCH: Final = 32

Scorer = Callable[[pa.Table, Path], pa.Table]
"""Fills in the missing aesthetic scores of a shard's measurements."""


class Inputs(Model):
    """What `measure` reads."""

    images: Manifest[ImageShards]


def preflight(config: MeasureConfig, outside: Mapping[str, str], _recipe: Recipe) -> None:  # noqa: ARG001
    """Look for the files of an aesthetic predictor on this machine. Raises `BadInput`; what is in them is looked at when it is loaded."""
    if "aesthetic_predictor" not in outside:
        return
    folder = Path(outside["aesthetic_predictor"].removeprefix("file://"))
    missing = [name for name in ("config.json", "head.safetensors") if folder.exists() and not (folder / name).is_file()]
    if missing:
        raise BadInput(f"measure.aesthetic_predictor {folder}: {', '.join(missing)} missing; expected a CLIP model and head.safetensors")


def run(config: MeasureConfig, inputs: Inputs, workspace: Workspace) -> Manifest[Measurements]:
    """Make the artifact `measurements`. With an aesthetic predictor its folder is at `workspace.outside["aesthetic_predictor"]`.

    Raises `BadInput` for a predictor that cannot be loaded. A picture that cannot be decoded is a row that says so, never an error.
    """
    shards = shard_paths(workspace.fetch(inputs.images))
    done = {part.name for part in workspace.parts()}
    score = _predictor(config, workspace)
    remaining = [number for number in range(len(shards)) if table_name(number) not in done]
    tables = map_processes(
        partial(measure_shard, analysis_px=config.analysis_px, thumbnail_px=config.thumbnail_px),
        [shards[number] for number in remaining],
        config.processes,
    )
    for number, (measured, thumbnails) in zip(remaining, tables, strict=True):
        table = score(measured, shards[number]) if score is not None else measured
        with workspace.folder("part") as folder:
            pq.write_table(table, folder / f"{table_name(number)}.parquet")
            pq.write_table(thumbnails, folder / f"{thumbnails_name(number)}.parquet", row_group_size=THUMBNAILS_PER_GROUP)
            workspace.save_part(table_name(number), folder, {"images": table.num_rows})
        workspace.progress.update(number + 1, len(shards), "shards")

    with workspace.folder("measurements") as folder:
        images = 0
        for part in workspace.parts():
            with workspace.folder("part") as place:
                for table in workspace.load_part(part, place).iterdir():
                    table.replace(folder / table.name)
            images += pq.read_metadata(folder / f"{part.name}.parquet").num_rows
        return workspace.publish(folder, Measurements(source=inputs.images.identity, images=images, shards=len(shards)))


def table_name(shard: int) -> str:
    """Name of a shard's table and of the part that keeps it, without suffix."""
    return f"measurements-{shard:05d}"


def thumbnails_name(shard: int) -> str:
    """Name of a shard's table of thumbnails, without suffix."""
    return f"thumbnails-{shard:05d}"


def _predictor(config: MeasureConfig, workspace: Workspace) -> Scorer | None:
    """What fills in missing aesthetic scores, when the recipe names a predictor."""
    if config.aesthetic_predictor is None:
        return None
    from stages.measure.aesthetic import AestheticPredictor  # noqa: PLC0415 - torch and CLIP, only where asked for

    predictor = AestheticPredictor.load(local_copy(workspace.outside["aesthetic_predictor"], workspace.scratch), workspace.device)

    def score(rows: pa.Table, shard: Path) -> pa.Table:
        wanted = pc.and_(pc.is_null(rows["aesthetic"]), pc.is_null(rows["unreadable"])).to_pylist()
        places = [place for place, want in zip(index_shard(shard), wanted, strict=True) if want]
        scores: list[float] = []
        for start in range(0, len(places), _SCORE_BATCH):
            scores += predictor.score_samples([place.read() for place in places[start : start + _SCORE_BATCH]])
        new = iter(scores)
        filled = [next(new) if want else old for want, old in zip(wanted, rows["aesthetic"].to_pylist(), strict=True)]
        return rows.set_column(rows.schema.get_field_index("aesthetic"), MEASUREMENTS.field("aesthetic"), pa.array(filled, pa.float64()))

    return score
