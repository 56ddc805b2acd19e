"""The stage `select`: measure every picture, judge, and copy what passes into shards of its own."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.outside import local_copy
from schemas.base import Model
from schemas.data import SelectConfig
from schemas.errors import BadInput, RunFailed
from schemas.manifest import ImageShards, Manifest, Selection
from schemas.recipe import Recipe
from stages.parallel import map_processes
from stages.select.criteria import counts, verdicts
from stages.select.measure import MEASUREMENTS, measure_shard
from stages.shards import ShardWriter, index_shard, read_samples, shard_paths
from stages.workspace import Workspace

logger = logging.getLogger(__name__)

_TABLE: Final = "measurements.parquet"
_SCORE_BATCH: Final = 32

Scorer = Callable[[pa.Table, Path], pa.Table]
"""Fills in the missing aesthetic scores of a shard's measurements."""


class Inputs(Model):
    """What `select` reads."""

    images: Manifest[ImageShards]


def preflight(config: SelectConfig, outside: Mapping[str, str], _recipe: Recipe) -> None:
    """Look for the files of an aesthetic predictor on this machine. Raises `BadInput`; what is in them is looked at when it is loaded."""
    if "aesthetic_predictor" not in outside or config.min_aesthetic is None:
        return
    folder = Path(outside["aesthetic_predictor"].removeprefix("file://"))
    missing = [name for name in ("config.json", "head.safetensors") if folder.exists() and not (folder / name).is_file()]
    if missing:
        raise BadInput(f"select.aesthetic_predictor {folder}: {', '.join(missing)} missing; expected a CLIP model and head.safetensors")


def run(config: SelectConfig, inputs: Inputs, workspace: Workspace) -> Manifest[Selection]:
    """Make the artifact `selection`. With an aesthetic predictor its folder is at `workspace.outside["aesthetic_predictor"]`.

    Raises `BadInput` for a predictor that cannot be loaded, and `RunFailed` when no picture passes. A picture that cannot be decoded is a verdict,
    never an error.
    """
    shards = shard_paths(workspace.fetch(inputs.images))
    measured = _measure_all(config, shards, workspace)
    judged = verdicts(pa.concat_tables(measured[shard.stem] for shard in shards), config)
    dropped = counts(judged)
    passed = set(judged["key"].filter(judged["passed"]).to_pylist())
    logger.info("%d of %d images selected; dropped %s", len(passed), judged.num_rows, dropped)
    if not passed:
        raise RunFailed(
            f"select: none of {judged.num_rows} images passes: " + ", ".join(f"{reason} {count}" for reason, count in dropped.items())
        )
    with workspace.folder("selection") as folder:
        pq.write_table(judged, folder / "verdicts.parquet")
        writer = ShardWriter(folder, config.shard_images)
        for shard in shards:
            for sample in read_samples(shard):
                if sample.key in passed:
                    writer.add(sample)
        writer.close()
        content = Selection(images_in=judged.num_rows, images=writer.images, dropped=dropped, shards=writer.shards)
        return workspace.publish(folder, content)


def _measure_all(config: SelectConfig, shards: list[Path], workspace: Workspace) -> Mapping[str, pa.Table]:
    """Measurements by shard, from parts where an earlier run left them; each new one is kept as a part."""
    tables: dict[str, pa.Table] = {}
    for part in workspace.parts():
        with workspace.folder("part") as folder:
            tables[part.name] = pq.read_table(workspace.load_part(part, folder) / _TABLE, memory_map=False)
    score = _predictor(config, workspace)
    remaining = [shard for shard in shards if shard.stem not in tables]
    results = map_processes(partial(measure_shard, analysis_px=config.analysis_px), remaining, config.processes)
    for shard, measurements in zip(remaining, results, strict=True):
        table = score(measurements, shard) if score is not None else measurements
        with workspace.folder("part") as folder:
            pq.write_table(table, folder / _TABLE)
            workspace.save_part(shard.stem, folder, {"images": table.num_rows})
        tables[shard.stem] = table
        workspace.progress.update(len(tables), len(shards), "shards")
    return tables


def _predictor(config: SelectConfig, workspace: Workspace) -> Scorer | None:
    """What fills in missing aesthetic scores, when the recipe names a predictor and asks for a score."""
    if config.aesthetic_predictor is None or config.min_aesthetic is None:
        return None
    from stages.select.aesthetic import AestheticPredictor  # noqa: PLC0415 - torch and CLIP, only where asked for

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
