"""The stage `select`: judge every picture by its measurements. No picture is read, so another threshold takes seconds."""

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.base import Model
from schemas.data import SelectConfig
from schemas.errors import RunFailed
from schemas.manifest import Manifest, Measurements, Selection
from stages.select.captions import CLEANING, EXAMPLES, clean_captions
from stages.select.criteria import REASONS, SAME_FILE, SAME_PICTURE, Codes, counts, judge, with_verdicts
from stages.select.fingerprints import Doubles, Fingerprints
from stages.select.report import Findings, write_report
from stages.select.survey import Survey
from stages.select.tables import Batch, batches, column, table_paths
from stages.workspace import Workspace

logger = logging.getLogger(__name__)


class Inputs(Model):
    """What `select` reads."""

    measurements: Manifest[Measurements]


def run(config: SelectConfig, inputs: Inputs, workspace: Workspace) -> Manifest[Selection]:
    """Make the artifact `selection`. Raises `RunFailed` when no picture passes.

    Two passes over the tables, in batches. The first cleans captions, judges every picture by itself and notes what duplicates are told by;
    then they are looked for over the whole set; the second writes the verdicts.
    """
    names = [entry.path for entry in inputs.measurements.files if entry.path.startswith("measurements-")]
    tables = table_paths(workspace.fetch(inputs.measurements, names), names)
    with workspace.folder("judged") as scratch, workspace.folder("selection") as folder:
        first = _FirstPass(config, scratch, Fingerprints(), Survey(config, len(tables)))
        for batch in batches(tables):
            first.add(batch)
            workspace.progress.update(int(batch.shard[-1]) + 1 if len(batch.shard) else 0, len(tables), "shards")
        codes = np.concatenate(first.codes) if first.codes else np.empty(0, np.uint8)
        doubles = first.fingerprints.doubles(config.max_hash_distance)
        codes[doubles.same_file] = REASONS.index(SAME_FILE) + 1
        codes[doubles.same_picture] = REASONS.index(SAME_PICTURE) + 1
        dropped = counts(codes)
        passed = len(codes) - sum(dropped.values())
        logger.info("%d of %d images selected; dropped %s", passed, len(codes), dropped)
        if not passed:
            raise RunFailed(
                f"select: none of {len(codes)} images passes: " + ", ".join(f"{reason} {count}" for reason, count in dropped.items())
            )
        _write_verdicts(first.kept, codes, folder / "verdicts.parquet")
        write_report(folder, first.findings(doubles, dropped), config, inputs.measurements, workspace)
        content = Selection(source=inputs.measurements.content.source, images_in=len(codes), images=passed, dropped=dropped)
        return workspace.publish(folder, content)


@dataclass
class _FirstPass:
    """What the first pass gathers. Of every row it keeps a byte, of those that pass some forty; the rows themselves wait on disk."""

    config: SelectConfig
    scratch: Path
    fingerprints: Fingerprints
    survey: Survey
    codes: list[Codes] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)
    changed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    starts: dict[int, int] = field(default_factory=dict)
    """Position of the first row of every shard among all rows."""

    def add(self, batch: Batch) -> None:
        """Clean and judge one batch."""
        raw = column(batch.rows, "caption")
        cleaned = clean_captions(raw, self.config.captions)
        rows = batch.rows.set_column(batch.rows.schema.get_field_index("caption"), "caption", cleaned.captions)
        batch = Batch(rows.append_column("raw_caption", raw), batch.first, batch.shard, batch.place)
        codes = judge(batch.rows, self.config)
        self.codes.append(codes)
        shards, places = np.unique(batch.shard, return_index=True)
        self.starts |= {int(shard): batch.first + int(place) for shard, place in zip(shards, places, strict=True)}
        self.fingerprints.add(batch, codes == 0)
        self.survey.add(batch, codes)
        self.changed.update(cleaned.changed)
        for rule, examples in cleaned.examples.items():
            self.examples[rule] = (*self.examples.get(rule, ()), *examples)[:EXAMPLES]
        path = self.scratch / f"{len(self.kept):06d}.arrow"
        with pa.ipc.new_file(path, batch.rows.schema) as writer:
            writer.write_table(batch.rows)
        self.kept.append(path)

    def findings(self, doubles: Doubles, dropped: dict[str, int]) -> Findings:
        """What the report is made of."""
        rules = [rule for rule in ("max_characters", *CLEANING) if rule in self.changed]
        return Findings(
            rows=sum(len(codes) for codes in self.codes),
            dropped=dropped,
            changed={rule: self.changed[rule] for rule in rules},
            examples={rule: self.examples[rule] for rule in rules},
            survey=self.survey,
            doubles=doubles,
            starts=self.starts,
        )


def _write_verdicts(kept: list[Path], codes: Codes, path: Path) -> None:
    """Write the rows with their verdicts, a row group a batch."""
    writer: pq.ParquetWriter | None = None
    position = 0
    for source in kept:
        with pa.memory_map(str(source)) as stream:
            rows = pa.ipc.open_file(stream).read_all()
            judged = with_verdicts(rows, codes[position : position + rows.num_rows])
            writer = writer or pq.ParquetWriter(path, judged.schema, compression="zstd")
            writer.write_table(judged)
        position += rows.num_rows
    if writer is not None:
        writer.close()
