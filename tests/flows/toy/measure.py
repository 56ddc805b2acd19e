"""Measures nothing of the rows."""

from schemas.base import Model
from schemas.data import MeasureConfig
from schemas.manifest import ImageShards, Manifest, Measurements
from stages.workspace import Workspace
from tests.flows.toy import note_run


class Inputs(Model):
    images: Manifest[ImageShards]


def run(config: MeasureConfig, inputs: Inputs, workspace: Workspace) -> Manifest[Measurements]:
    note_run("measure")
    rows = (workspace.fetch(inputs.images) / "rows.txt").read_text()
    with workspace.folder("rows") as folder:
        (folder / "rows.txt").write_text(rows)
        content = Measurements(source=inputs.images.identity, images=inputs.images.content.images, shards=1)
        return workspace.publish(folder, content)
