"""Keeps every second row."""

from schemas.base import Model
from schemas.data import SelectConfig
from schemas.manifest import Manifest, Measurements, Selection
from stages.workspace import Workspace
from tests.flows.toy import note_run


class Inputs(Model):
    measurements: Manifest[Measurements]


def run(config: SelectConfig, inputs: Inputs, workspace: Workspace) -> Manifest[Selection]:
    note_run("select")
    rows = (workspace.fetch(inputs.measurements) / "rows.txt").read_text().splitlines()[::2]
    with workspace.folder("rows") as folder:
        (folder / "rows.txt").write_text("\n".join([f"sharper than {config.min_sharpness}", *rows]))
        measured = inputs.measurements.content
        return workspace.publish(folder, Selection(source=measured.source, images_in=measured.images, images=len(rows)))
