"""Keeps every second row."""

from schemas.base import Model
from schemas.data import SelectConfig
from schemas.manifest import ImageShards, Manifest, Selection
from stages.workspace import Workspace
from tests.flows.toy import note_run


class Inputs(Model):
    images: Manifest[ImageShards]


def run(config: SelectConfig, inputs: Inputs, workspace: Workspace) -> Manifest[Selection]:
    note_run("select")
    rows = (workspace.fetch(inputs.images) / "rows.txt").read_text().splitlines()[::2]
    with workspace.folder("rows") as folder:
        (folder / "rows.txt").write_text("\n".join([f"sharper than {config.min_sharpness}", *rows]))
        return workspace.publish(folder, Selection(images_in=inputs.images.content.images, images=len(rows), shards=1))
