"""Features of one set of pictures, with what several metrics need of them computed once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from schemas.errors import BadInput
from stages.evaluate.fid import FeatureStatistics

Array = NDArray[np.float64]

_BLOCK: Final = 256
"""Rows of one block of a matrix of pairs: 40,000 pictures make blocks of 80 MB."""


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Features (N, D) of N pictures."""

    features: NDArray[np.floating]
    _known: dict[str, Array] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Array]) -> Array:
        """What `make` gives, under a name: a reference is compared with every row, and what is its own is computed for the first."""
        if name not in self._known:
            self._known[name] = make()
        return self._known[name]

    @property
    def images(self) -> int:
        """N."""
        return len(self.features)

    @cached_property
    def wide(self) -> Array:
        """Features in float64."""
        return np.asarray(self.features, np.float64)

    @cached_property
    def statistics(self) -> FeatureStatistics:
        """Mean and covariance."""
        return FeatureStatistics.of(self.features)

    @cached_property
    def centred(self) -> Array:
        """(N, D): features without their mean, over the root of N - 1; covariance = centred.T @ centred."""
        centred: Array = (self.wide - self.statistics.mean) / np.sqrt(self.images - 1)
        return centred

    def coordinates(self, vectors: Array) -> Array:
        """(N, r): coordinates z of the pictures, with centred = z @ factor.T for the covariance's factor, along `vectors` (rank, r): z @ vectors."""
        if self.images <= self.statistics.dimensions:  # the factor is the centred features themselves
            return vectors
        factor = self.statistics.factor
        variances = (factor**2).sum(axis=0)
        inverse = np.divide(1.0, variances, out=np.zeros_like(variances), where=variances > variances.max() * 1e-12)
        along: Array = self.centred @ ((factor * inverse) @ vectors)
        return along

    @cached_property
    def squares(self) -> Array:
        """(N,): squared lengths."""
        squares: Array = np.einsum("nd,nd->n", self.wide, self.wide)
        return squares

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or self.images < 2:
            raise BadInput(f"features of shape {self.features.shape}; expected (N, D) of at least 2 images")


def products(first: FeatureSet, second: FeatureSet) -> Iterator[tuple[slice, Array]]:
    """Yield rows of the matrix of inner products (N, M), block by block. Raises `BadInput` for features of other dimensions."""
    if first.wide.shape[1] != second.wide.shape[1]:
        raise BadInput(f"features of {first.wide.shape[1]} and {second.wide.shape[1]} dimensions cannot be compared")
    for start in range(0, first.images, _BLOCK):
        rows = slice(start, min(start + _BLOCK, first.images))
        yield rows, first.wide[rows] @ second.wide.T
