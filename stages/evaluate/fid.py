"""Fréchet distance between two sets of features, in float64.

FID (arXiv 1706.08500) is |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)). The trace of the root is taken as the sum of the singular values of
F1^T F2, where S = F F^T: with fewer images than features the product S1 S2 is singular, a matrix root of it is slow and loses digits, and this
is neither.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from schemas.errors import BadInput

Array = NDArray[np.float64]

FEWEST_IMAGES: Final = 2048
"""Below so many a FID means nothing by itself: Inception's features, whose covariance has no full rank then."""
SETTLED_IMAGES: Final = 10_000
"""What published protocols take at least."""


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of N features of D dimensions, the covariance as a factor."""

    mean: Array
    """(D,)"""
    factor: Array
    """(D, min(N, D)); covariance = factor @ factor.T, with N - 1 in the denominator."""
    images: int

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> "FeatureStatistics":
        """Statistics of features (N, D). Raises `BadInput` for fewer than two."""
        count, dimensions = features.shape
        if count < 2:
            raise BadInput(f"FID of {count} image(s) is not defined; expected at least 2")
        wide = features.astype(np.float64)
        mean = wide.mean(axis=0)
        centred = (wide - mean) / np.sqrt(count - 1)
        if count <= dimensions:
            return cls(mean, centred.T, count)
        values, vectors = np.linalg.eigh(centred.T @ centred)
        return cls(mean, vectors * np.sqrt(values.clip(min=0)), count)

    @property
    def dimensions(self) -> int:
        """D, the number of features of an image."""
        return int(self.mean.shape[0])

    def tensors(self) -> Mapping[str, Array]:
        """What has to be kept to use the set as a reference again."""
        return {"mean": self.mean, "factor": self.factor}


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Fréchet distance between the Gaussians with these statistics. Never negative."""
    check_dimensions(first, second)
    difference = first.mean - second.mean
    root = np.linalg.svd(first.factor.T @ second.factor, compute_uv=False).sum()
    distance = difference @ difference + (first.factor**2).sum() + (second.factor**2).sum() - 2 * root
    return max(float(distance), 0.0)


def check_dimensions(first: FeatureStatistics, second: FeatureStatistics) -> None:
    """Raise `BadInput` unless both are statistics of as many features."""
    if first.dimensions != second.dimensions:
        raise BadInput(f"features of {first.dimensions} and {second.dimensions} dimensions cannot be compared")


def bias_warning(images: int, dimensions: int) -> str | None:
    """What a reader must know of FIDs of so many images, with features of so many dimensions; None where that is little.

    The expectation of a FID is that of its limit and c / images, with a c that depends on the model (Chong and Forsyth, arXiv 1911.07023).
    """
    least = max(FEWEST_IMAGES, dimensions)
    if images < least:
        return (
            f"FID of {images} images with {dimensions} features means nothing by itself: of fewer than {least} the covariance cannot be estimated, "
            "and most of the figure is bias, which falls with their number."
        )
    if images < SETTLED_IMAGES:
        return f"FID of {images} images is biased upwards, by what falls as one over their number: it compares with figures of as many images alone."
    return None
