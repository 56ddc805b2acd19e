"""The stage `reference`: features of real images from elsewhere, computed once for every evaluation that compares with them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from safetensors.numpy import load_file, save_file

from infra.outside import local_copy, on_this_machine
from schemas.base import Model
from schemas.errors import BadInput
from schemas.evaluation import ReferenceConfig
from schemas.extractors import EXTRACTOR_WEIGHTS
from schemas.manifest import Manifest, ReferenceSet
from schemas.recipe import Recipe
from stages.evaluate.features import check_extractor, open_extractor
from stages.evaluate.metrics.sets import FeatureSet
from stages.evaluate.pieces import Pieces
from stages.evaluate.samples import Pixels
from stages.evaluate.scoring import Sets
from stages.evaluate.views import Viewer, views_of
from stages.pictures import BrokenPictureError, decode_rgb
from stages.workspace import Workspace

SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp")


class Inputs(Model):
    """Nothing on the store."""


def preflight(config: ReferenceConfig, outside: Mapping[str, str], _recipe: Recipe) -> None:
    """Look for what the extractor needs, and for pictures where the folder is on this machine. Raises `BadInput`."""
    check_extractor(config.extractor, outside)
    if (folder := on_this_machine(outside["reference"])) is not None:
        picture_files(folder)


def run(config: ReferenceConfig, _inputs: Inputs, workspace: Workspace) -> Manifest[ReferenceSet]:
    """Make the artifact `reference_set`. Raises `BadInput` for a folder of fewer than two pictures, and for a picture that is broken or smaller than
    a patch."""
    network = open_extractor(config.extractor, workspace.outside, workspace.scratch, workspace.device)
    source = local_copy(workspace.outside["reference"], workspace.scratch, lambda path: path.lower().endswith(SUFFIXES))
    paths = picture_files(source)
    viewer = Viewer(config, network, workspace.device, Pieces(workspace))
    sets = viewer.look("reference", lambda: _pictures(paths, workspace), views_of(config))
    with workspace.folder("reference") as folder:
        for view, of in sets.items():
            save_file({"features": np.asarray(of.features)}, folder / f"{view}.safetensors")
        return workspace.publish(folder, ReferenceSet(images=len(paths), extractor=config.extractor))


def read_reference(manifest: Manifest[ReferenceSet], config: ReferenceConfig, workspace: Workspace) -> Sets:
    """Features of the artifact. Raises `BadInput` where it lacks what the evaluation's settings ask for: one given in the place of the plan's own."""
    folder, views = workspace.fetch(manifest), views_of(config)
    other = manifest.lineage.inputs.get(EXTRACTOR_WEIGHTS) != workspace.lineage.inputs.get(EXTRACTOR_WEIGHTS)
    if manifest.content.extractor != config.extractor or other or any(not (folder / f"{view}.safetensors").exists() for view in views):
        found = f"reference {manifest.identity[:12]}: features of {manifest.content.extractor}"
        weights = " with other weights" if other else ""
        raise BadInput(f"{found}{weights}; expected {', '.join(views)} of {config.extractor}")
    return {view: FeatureSet(load_file(folder / f"{view}.safetensors")["features"]) for view in views}


def picture_files(folder: Path) -> list[Path]:
    """Pictures in a folder and below it, by name. Raises `BadInput` for fewer than two."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(found) < 2:
        raise BadInput(f"evaluate.reference {folder}: holds {len(found)} pictures; expected a folder of at least 2 {', '.join(SUFFIXES)}")
    return found


def _pictures(paths: Sequence[Path], workspace: Workspace) -> Iterator[Pixels]:
    for number, path in enumerate(paths):
        try:
            yield np.asarray(decode_rgb(path.read_bytes())[0])
        except BrokenPictureError as error:
            raise BadInput(f"evaluate.reference {path}: {error}") from error
        workspace.progress.update(number + 1, len(paths), "images")
