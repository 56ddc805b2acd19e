"""FID with the influence of every picture on it, from which its interval is made."""

import numpy as np

from stages.evaluate.fid import check_dimensions
from stages.evaluate.metrics.bootstrap import Estimate
from stages.evaluate.metrics.sets import Array, FeatureSet


def frechet(own: FeatureSet, reference: FeatureSet) -> Estimate:
    """Fréchet distance of two sets (`stages.evaluate.fid`).

    With S = F F^T, the trace of the root is the nuclear norm of A = F1^T F2 = U diag(s) V^T, whose derivative is U V^T. A weight w_i of picture i
    scales its row z_i of F1's coordinates by w_i^(1/2), hence the norm by z_i^T U diag(s) U^T z_i / 2; the same with V for the reference.
    """
    one, two = own.statistics, reference.statistics
    check_dimensions(one, two)
    left, roots, right = np.linalg.svd(one.factor.T @ two.factor, full_matrices=False)
    difference = one.mean - two.mean
    distance = difference @ difference + (one.factor**2).sum() + (two.factor**2).sum() - 2 * roots.sum()
    return Estimate(
        max(float(distance), 0.0),
        _influence(own, left, roots, difference),
        _influence(reference, right.T, roots, -difference),
    )


def _influence(of: FeatureSet, vectors: Array, roots: Array, difference: Array) -> Array:
    """(N,), mean zero. `difference` is the set's mean less the other's."""
    spread: Array = (of.centred**2).sum(axis=1) - (of.coordinates(vectors) ** 2) @ roots
    shift = 2 * (of.wide - of.statistics.mean) @ difference
    influence = of.images * spread + shift
    centred: Array = influence - influence.mean()
    return centred
