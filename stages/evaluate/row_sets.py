"""Features of every set of pictures that an evaluation compares: taken over from an earlier one, or sampled and looked at."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from schemas.base import Sha256
from schemas.evaluation import ReferenceConfig
from stages.diffusion.denoiser import Denoiser
from stages.evaluate.features import ExtractorSpec
from stages.evaluate.inputs import Inputs
from stages.evaluate.metrics.catalogue import View
from stages.evaluate.past import PastRows, features_file, key_of, row_key, samples_folder
from stages.evaluate.pieces import Pieces
from stages.evaluate.rows import Row
from stages.evaluate.samples import Sampler, read_pictures, sample_row
from stages.evaluate.scoring import Sets
from stages.evaluate.views import Viewer, keep_sets, read_sets, views_of
from stages.selected import SelectedPictures
from stages.workspace import Workspace


class RowSets:
    """The sets of one evaluation, whose samples and features lie in its `folder`."""

    def __init__(self, folder: Path, looks: ReferenceConfig, spec: ExtractorSpec, pieces: Pieces, workspace: Workspace) -> None:
        self.folder, self.looks, self.pieces, self.workspace = folder, looks, pieces, workspace
        self.keys: dict[str, Sha256] = {}
        """By the name of a set's files, what they follow from."""
        self._past = PastRows(workspace)
        self._viewer = Viewer(looks, spec, workspace.device, pieces)

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
        if weights is not None:
            self.keys[row.slug] = row_key(row, sampler, self.looks, views, weights)
        if weights is not None and self._past.take(self.keys[row.slug], row.slug, self.folder):
            sampler.tick(len(sampler.prompts.images))
        else:
            sample_row(row, load, sampler, self.pieces, samples)
            keep_sets(self._viewer.look(row.slug, functools.partial(read_pictures, samples), views), file)
        if self.workspace.device.startswith("cuda"):
            torch.cuda.empty_cache()
        return read_sets(file)

    def of_selection(self, inputs: Inputs, resolution: int) -> Sets:
        """Features of the selection's pictures, as squares of the teacher's `resolution` (pixels)."""
        name = "real"
        file = features_file(self.folder, name)
        sources = {"images": inputs.images.identity, "selection": inputs.selection.identity}
        self.keys[name] = key_of(**sources, side=resolution, looks=self.looks.identity_fields())
        if not self._past.take(self.keys[name], name, self.folder):
            chosen = SelectedPictures.open(inputs.images, inputs.selection, self.workspace)
            keep_sets(self._viewer.selected(chosen, resolution), file)
        return read_sets(file)
