"""Fidelity and diversity apart: precision and recall (Kynkäänniemi et al., arXiv 1904.06991), density and coverage (Naeem et al., arXiv 2002.09797).

A set's manifold is the union of balls around its pictures, each as large as the distance to the k-th nearest of the others. The intervals hold the
manifold fixed and draw the pictures that are looked for on it: of a set drawn with replacement the balls would shrink to nothing.
"""

from typing import Final

import numpy as np

from schemas.errors import BadInput
from stages.evaluate.metrics.bootstrap import Estimate
from stages.evaluate.metrics.sets import Array, FeatureSet, products

PRECISION_NEIGHBOURS: Final = 3
"""k, arXiv 1904.06991, section 2."""
DENSITY_NEIGHBOURS: Final = 5
"""k, arXiv 2002.09797, section 4."""


def precision_recall(own: FeatureSet, reference: FeatureSet) -> dict[str, Estimate]:
    """`precision`: share of the set's own pictures on the reference's manifold. `recall`: share of the reference's pictures on the set's."""
    of_own, of_reference = (_squared_radii(features, PRECISION_NEIGHBOURS) for features in (own, reference))
    precise, recalled = np.zeros(own.images, bool), np.zeros(reference.images, bool)
    for rows, block in products(own, reference):
        squared = _squared_distances(block, own, reference, rows)
        precise[rows] = (squared <= of_reference).any(axis=1)
        recalled |= (squared <= of_own[rows, None]).any(axis=0)
    return {"precision": Estimate.of_mean(precise), "recall": _of_reference(recalled, own)}


def density_coverage(own: FeatureSet, reference: FeatureSet) -> dict[str, Estimate]:
    """`density`: balls of the reference that hold a picture of the set, mean over its pictures and over k: above 1 where they crowd its modes.
    `coverage`: share of the reference's balls that hold a picture of the set."""
    radii = _squared_radii(reference, DENSITY_NEIGHBOURS)
    balls, covered = np.zeros(own.images), np.zeros(reference.images, bool)
    for rows, block in products(own, reference):
        inside = _squared_distances(block, own, reference, rows) <= radii
        balls[rows] = inside.sum(axis=1)
        covered |= inside.any(axis=0)
    return {"density": Estimate.of_mean(balls / DENSITY_NEIGHBOURS), "coverage": _of_reference(covered, own)}


def _of_reference(found: np.ndarray, own: FeatureSet) -> Estimate:
    """A mean over the reference's pictures."""
    mean = Estimate.of_mean(found)
    return Estimate(mean.value, np.zeros(own.images), mean.own)


def _squared_radii(of: FeatureSet, neighbours: int) -> Array:
    """(N,): squared distance of every picture to its k-th nearest other."""
    return of.once(f"radii of {neighbours}", lambda: _radii(of, neighbours))


def _radii(of: FeatureSet, neighbours: int) -> Array:
    if of.images <= neighbours:
        raise BadInput(f"a manifold of {of.images} images with {neighbours} nearest neighbours; expected more images than neighbours")
    found = np.empty(of.images)
    for rows, block in products(of, of):
        squared = _squared_distances(block, of, of, rows)
        squared[np.arange(len(squared)), np.arange(rows.start, rows.stop)] = np.inf
        found[rows] = np.partition(squared, neighbours - 1, axis=1)[:, neighbours - 1]
    return found


def _squared_distances(inner: Array, first: FeatureSet, second: FeatureSet, rows: slice) -> Array:
    squared: Array = (first.squares[rows, None] + second.squares - 2 * inner).clip(min=0)
    return squared
