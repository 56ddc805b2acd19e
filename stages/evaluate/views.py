"""What the feature network is shown of pictures, the whole or a crop of the centre, and what it finds, which is kept."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from schemas.errors import BadInput
from schemas.evaluation import ReferenceConfig
from stages.evaluate.feature_network import FeatureNetwork, features_of
from stages.evaluate.metrics.catalogue import View
from stages.evaluate.metrics.sets import FeatureSet
from stages.evaluate.pieces import Pieces
from stages.evaluate.samples import Pixels, real_pictures, square
from stages.evaluate.scoring import Sets
from stages.selected import SelectedPictures

_PIECES: Final[Mapping[View, str]] = {"whole": "features", "patch": "patches"}
"""What kept features are called, before the name of their set."""


def views_of(config: ReferenceConfig) -> tuple[View, ...]:
    """What is looked at."""
    return ("whole",) if config.patch_px is None else ("whole", "patch")


class Viewer:
    """The feature network of one run. A killed run does not look at the pictures again."""

    def __init__(self, config: ReferenceConfig, network: FeatureNetwork, device: str, pieces: Pieces) -> None:
        self.config, self.network, self.device, self.pieces = config, network, device, pieces

    def look(self, name: str, pictures: Callable[[], Iterable[Pixels]], views: Iterable[View]) -> Sets:
        """Features of pictures as they are: samples, or real images whose size is not the teacher's."""
        shown: Mapping[View, Callable[[], Iterable[Pixels]]] = {
            "whole": lambda: whole(pictures(), self.config.resize_px),
            "patch": lambda: patches(pictures(), self.config.patch_px),
        }
        return {view: self._features(view, name, shown[view]) for view in views}

    def selected(self, chosen: SelectedPictures, resolution: int) -> Sets:
        """Features of a selection's pictures as squares of the teacher's `resolution` (pixels), which it was trained or will be compared at."""
        shown: Mapping[View, Callable[[], Iterable[Pixels]]] = {
            "whole": lambda: real_pictures(chosen, self.config.resize_px or resolution),
            "patch": lambda: patches(real_pictures(chosen, resolution), self.config.patch_px),
        }
        return {view: self._features(view, "real", shown[view]) for view in views_of(self.config)}

    def _features(self, view: View, name: str, pictures: Callable[[], Iterable[Pixels]]) -> FeatureSet:
        with self.pieces.piece(f"{_PIECES[view]}-{name}") as (folder, made):
            path = folder / "features.safetensors"
            if not made:
                save_file({"features": features_of(pictures(), self.network, self.device)}, path)
            return FeatureSet(load_file(path)["features"])


def keep_sets(sets: Sets, path: Path) -> None:
    """Write features by what was shown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({view: np.asarray(of.features) for view, of in sets.items()}, path)


def read_sets(path: Path) -> Sets:
    """Read what `keep_sets` wrote."""
    return {view: FeatureSet(features) for view, features in load_file(path).items()}  # type: ignore[misc]  # its keys are views


def whole(pictures: Iterable[Pixels], side: int | None) -> Iterator[Pixels]:
    """Centre squares of `side` pixels, resized by Lanczos; None: pictures as they are."""
    for picture in pictures:
        yield picture if side is None else np.asarray(square(Image.fromarray(picture), side))


def patches(pictures: Iterable[Pixels], side: int | None) -> Iterator[Pixels]:
    """The middle of every picture. None is a mistake of the caller: there are no patches."""
    assert side is not None, "patches were not asked for"
    for picture in pictures:
        yield centre_patch(picture, side)


def centre_patch(picture: Pixels, side: int) -> Pixels:
    """The middle of a picture (H, W, 3), (side, side, 3), nothing resized. Raises `BadInput` for a picture that is smaller."""
    height, width = picture.shape[:2]
    if min(height, width) < side:
        raise BadInput(f"evaluate.patch_px: a picture of {height} x {width} px has no patch of {side} px; expected larger pictures")
    top, left = (height - side) // 2, (width - side) // 2
    return np.ascontiguousarray(picture[top : top + side, left : left + side])
