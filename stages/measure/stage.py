"""The stage `measure`: a map over image shards; each one's tables are kept as soon as they are made."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pyarrow as pa
import pyarrow.parquet as pq

from infra.outside import local_copy
from schemas.base import Model
from schemas.data import MeasureConfig
from schemas.errors import BadInput
from schemas.manifest import ImageShards, Manifest, Measurements
from schemas.recipe import Recipe
from stages.measure.pictures import MEASUREMENTS, Measured, Slice, measure_slice
from stages.parallel import stream_processes
from stages.shards import Place, index_shard, shard_names
from stages.workspace import Workspace

if TYPE_CHECKING:
    from stages.measure.aesthetic import AestheticPredictor

THUMBNAILS_PER_GROUP: Final = 64
"""Rows of a row group, so that one thumbnail can be read without its whole file."""
SLICE_IMAGES: Final = 64
"""Pictures that a process measures at a time: seconds of work, and few enough to wait in memory."""
_SCORE_BATCH: Final = 64


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

    One shard after the other is fetched, measured by all processes, kept and let go, while the next one is fetched: neither the disk nor the memory
    need hold more. Raises `BadInput` for a predictor that cannot be loaded. A picture that cannot be decoded is a row that says so, never an error.
    """
    shards = shard_names(inputs.images)
    predictor = _predictor(config, workspace)
    done = {part.name for part in workspace.parts()}
    remaining = [number for number in range(len(shards)) if table_name(number) not in done]
    work = partial(
        measure_slice,
        analysis_px=config.analysis_px,
        thumbnail_px=config.thumbnail_px,
        predictor_px=None if predictor is None else predictor.image_size,
    )
    processes = min(config.processes, -(-inputs.images.content.images // SLICE_IMAGES))
    finished: list[Measured] = []
    for part, measured in stream_processes(work, _slices(inputs.images, shards, remaining, workspace), processes):
        finished.append(measured if predictor is None else _scored(measured, predictor))
        if part.last:
            _keep(workspace, part.shard, finished)
            workspace.store.release(inputs.images, [shards[part.shard]])
            workspace.progress.update(part.shard + 1, len(shards), "shards")
            finished = []
    return _publish(inputs, workspace, len(shards))


def _slices(images: Manifest[ImageShards], shards: Sequence[str], remaining: Sequence[int], workspace: Workspace) -> Iterator[Slice]:
    """The remaining shards in pieces, each shard fetched while the one before is worked on."""

    def fetch(number: int) -> list[Place]:
        return index_shard(workspace.fetch(images, [shards[number]]) / shards[number])

    with ThreadPoolExecutor(1, "fetch") as thread:
        ahead = [thread.submit(fetch, number) for number in remaining[:1]]
        for position, number in enumerate(remaining):
            places = ahead.pop().result()
            ahead += [thread.submit(fetch, following) for following in remaining[position + 1 : position + 2]]
            starts = range(0, max(1, len(places)), SLICE_IMAGES)
            for start in starts:
                yield Slice(number, places[start : start + SLICE_IMAGES], last=start == starts[-1])


def _keep(workspace: Workspace, shard: int, measured: Sequence[Measured]) -> None:
    """Write a shard's two tables and keep them."""
    with workspace.folder("part") as folder:
        rows = pa.concat_tables(one.rows for one in measured)
        pq.write_table(rows, folder / f"{table_name(shard)}.parquet")
        thumbnails = pa.concat_tables(one.thumbnails for one in measured)
        pq.write_table(thumbnails, folder / f"{thumbnails_name(shard)}.parquet", row_group_size=THUMBNAILS_PER_GROUP)
        workspace.save_part(table_name(shard), folder, {"images": rows.num_rows})


def _publish(inputs: Inputs, workspace: Workspace, shards: int) -> Manifest[Measurements]:
    parts = {part.name: part for part in workspace.parts()}
    with workspace.folder("measurements") as folder:
        images = 0
        for shard in range(shards):
            with workspace.folder("part") as place:
                for table in workspace.load_part(parts[table_name(shard)], place).iterdir():
                    table.replace(folder / table.name)
            images += pq.read_metadata(folder / f"{table_name(shard)}.parquet").num_rows
        return workspace.publish(folder, Measurements(source=inputs.images.identity, images=images, shards=shards))


def table_name(shard: int) -> str:
    """Name of a shard's table and of the part that keeps it, without suffix."""
    return f"measurements-{shard:05d}"


def thumbnails_name(shard: int) -> str:
    """Name of a shard's table of thumbnails, without suffix."""
    return f"thumbnails-{shard:05d}"


def _predictor(config: MeasureConfig, workspace: Workspace) -> "AestheticPredictor | None":
    """What fills in missing aesthetic scores, when the recipe names a predictor."""
    if config.aesthetic_predictor is None:
        return None
    from stages.measure.aesthetic import AestheticPredictor  # noqa: PLC0415 - torch and CLIP, only where asked for

    return AestheticPredictor.load(local_copy(workspace.outside["aesthetic_predictor"], workspace.scratch), workspace.device)


def _scored(measured: Measured, predictor: "AestheticPredictor") -> Measured:
    """Fill in the missing aesthetic scores."""
    scores = measured.rows["aesthetic"].to_pylist()
    numbers = list(measured.to_score)
    for start in range(0, len(numbers), _SCORE_BATCH):
        batch = numbers[start : start + _SCORE_BATCH]
        for number, score in zip(batch, predictor.score([measured.to_score[number] for number in batch]), strict=True):
            scores[number] = score
    column = measured.rows.schema.get_field_index("aesthetic")
    rows = measured.rows.set_column(column, MEASUREMENTS.field("aesthetic"), pa.array(scores, pa.float64()))
    return replace(measured, rows=rows, to_score={})
