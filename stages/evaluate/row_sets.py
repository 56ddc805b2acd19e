"""What an evaluation finds of every set of pictures, features and numbers of each: taken over from an earlier one, or sampled and looked at."""

import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from schemas.base import Sha256
from schemas.evaluation import ReferenceConfig
from schemas.extractors import EXTRACTOR_WEIGHTS
from stages.diffusion.denoiser import Denoiser
from stages.evaluate.feature_network import FeatureNetwork
from stages.evaluate.inputs import Inputs
from stages.evaluate.metrics.catalogue import View
from stages.evaluate.past import PastRows, copy_row, features_file, key_of, numbers_file, row_key, samples_folder
from stages.evaluate.pieces import Pieces
from stages.evaluate.rows import Row
from stages.evaluate.samples import Sampler, read_pictures, sample_row
from stages.evaluate.scoring import Sets
from stages.evaluate.views import Viewer, keep_sets, read_sets, views_of
from stages.selected import SelectedPictures
from stages.workspace import Workspace

Numbers = NDArray[np.float32]


class RowSets:
    """The sets of one evaluation, whose samples and features lie in its `folder`."""

    def __init__(self, folder: Path, looks: ReferenceConfig, network: FeatureNetwork, pieces: Pieces, workspace: Workspace) -> None:
        self.folder, self.looks, self.pieces, self.workspace = folder, looks, pieces, workspace
        self.keys: dict[str, Sha256] = {}
        """By the name of a set's files, what they follow from."""
        self._past = PastRows(workspace)
        self._viewer = Viewer(looks, network, workspace.device, pieces)
        self._looked: dict[str, Any] = looks.identity_fields()
        """What features follow from beside the pictures; weights of unknown content are this evaluation's own."""
        if EXTRACTOR_WEIGHTS in workspace.outside:
            self._looked[EXTRACTOR_WEIGHTS] = workspace.lineage.inputs.get(EXTRACTOR_WEIGHTS, workspace.identity)

    def of_row(
        self,
        row: Row,
        sampler: Sampler,
        load: Callable[[], Denoiser],
        weights: Mapping[str, Any] | None,
        shown: tuple[View, ...] | None = None,
    ) -> Sets:
        """Features of a row's samples. `load` loads its denoiser; `weights` says by digests what that is, None where it is not known; `shown` is what
        is looked at of its samples, None for all that the recipe asks for."""
        views = views_of(self.looks) if shown is None else shown
        file, samples = features_file(self.folder, row.slug), samples_folder(self.folder, row.slug)
        key = None if weights is None else row_key(row, sampler, self._looked, views, weights)
        if key is not None and self._taken_over(key, row.slug):
            sampler.tick(len(sampler.prompts.images))
        else:
            sample_row(row, load, sampler, self.pieces, samples)
            keep_sets(self._viewer.look(row.slug, functools.partial(read_pictures, samples), views), file)
        if key is not None:
            self.keys[row.slug] = key
        if self.workspace.device.startswith("cuda"):
            torch.cuda.empty_cache()
        return read_sets(file)

    def _taken_over(self, key: Sha256, slug: str) -> bool:
        """Whether a row's files are there already, of this evaluation or an earlier one: entries of `transfer` that differ in what their students do
        share their teacher's rows."""
        alike = next((known for known, of_row in self.keys.items() if of_row == key), None)
        if alike is None:
            return self._past.take(key, slug, self.folder)
        copy_row(self.folder, alike, slug)
        return True

    def numbers(self, metric: str, slug: str, made_of: Mapping[str, Any], make: Callable[[], Numbers]) -> Numbers:
        """One number a picture of a row, (N,). `made_of` says by digests and settings what they follow from; one that is None is not known."""
        name = f"{metric}-{slug}"
        file = numbers_file(self.folder, name)
        known = None not in made_of.values()
        if known:
            self.keys[name] = key_of(metric=metric, **made_of)
        if not (known and self._past.take_numbers(self.keys[name], name, self.folder)):
            with self.pieces.piece(name) as (folder, made):
                piece = folder / "numbers.safetensors"
                if not made:
                    save_file({"numbers": make()}, piece)
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(piece, file)
        return load_file(file)["numbers"]

    def of_selection(self, inputs: Inputs, resolution: int) -> Sets:
        """Features of the selection's pictures, as squares of the teacher's `resolution` (pixels)."""
        name = "real"
        file = features_file(self.folder, name)
        sources = {"images": inputs.images.identity, "selection": inputs.selection.identity}
        self.keys[name] = key_of(**sources, side=resolution, looks=self._looked)
        if not self._past.take(self.keys[name], name, self.folder):
            chosen = SelectedPictures.open(inputs.images, inputs.selection, self.workspace)
            keep_sets(self._viewer.selected(chosen, resolution), file)
        return read_sets(file)
