"""The stage `select`: judge every picture by its measurements. No picture is read, so another threshold takes seconds."""

import logging

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.base import Model
from schemas.data import SelectConfig
from schemas.errors import RunFailed
from schemas.manifest import Manifest, Measurements, Selection
from stages.select.criteria import counts, verdicts
from stages.workspace import Workspace

logger = logging.getLogger(__name__)


class Inputs(Model):
    """What `select` reads."""

    measurements: Manifest[Measurements]


def run(config: SelectConfig, inputs: Inputs, workspace: Workspace) -> Manifest[Selection]:
    """Make the artifact `selection`. Raises `RunFailed` when no picture passes."""
    tables = sorted(workspace.fetch(inputs.measurements).glob("measurements-*.parquet"))
    judged = verdicts(pa.concat_tables(pq.read_table(table) for table in tables), config)
    dropped = counts(judged)
    passed = judged.num_rows - sum(dropped.values())
    logger.info("%d of %d images selected; dropped %s", passed, judged.num_rows, dropped)
    if not passed:
        raise RunFailed(
            f"select: none of {judged.num_rows} images passes: " + ", ".join(f"{reason} {count}" for reason, count in dropped.items())
        )
    with workspace.folder("selection") as folder:
        pq.write_table(judged, folder / "verdicts.parquet")
        content = Selection(source=inputs.measurements.content.source, images_in=judged.num_rows, images=passed, dropped=dropped)
        return workspace.publish(folder, content)
