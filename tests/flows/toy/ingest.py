"""Copies the table."""

from collections.abc import Mapping
from pathlib import Path

from schemas.base import Model
from schemas.data import IngestConfig
from schemas.errors import BadInput
from schemas.manifest import ImageShards, Manifest
from schemas.recipe import Recipe
from stages.workspace import Workspace
from tests.flows.toy import note_run


class Inputs(Model):
    pass


def preflight(config: IngestConfig, outside: Mapping[str, str], recipe: Recipe) -> None:
    if "url" not in Path(outside["table"]).read_text(errors="replace"):
        raise BadInput(f"{outside['table']}: has no column url")


def run(config: IngestConfig, inputs: Inputs, workspace: Workspace) -> Manifest[ImageShards]:
    note_run("ingest")
    rows = Path(workspace.outside["table"]).read_text(errors="replace").splitlines()
    with workspace.folder("rows") as folder:
        (folder / "rows.txt").write_text("\n".join(rows))
        return workspace.publish(folder, ImageShards(rows_in_table=len(rows), images=len(rows), shards=config.shard_images))
