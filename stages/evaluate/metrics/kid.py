"""KID (Bińkowski et al., arXiv 1801.01401): squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, without bias.

Computed over all pairs; clean-fid takes the mean over random subsets of 1,000, which has the same expectation.

Without bias for independent sets. Sets of the same prompts, such as a row and the teacher's other samples, have their likes in each other: theirs is
somewhat below zero where both are of one model.
"""

from functools import partial

import numpy as np

from stages.evaluate.metrics.bootstrap import Estimate
from stages.evaluate.metrics.sets import Array, FeatureSet, products


def kid(own: FeatureSet, reference: FeatureSet) -> Estimate:
    """KID of two sets of features. Below zero by chance where they are of one distribution.

    The influences are those of its two means within the sets and of the one between them (Hájek's projection of a U-statistic).
    """
    within_own, within_reference = (features.once("kid", partial(_within, features)) for features in (own, reference))
    between_own, between_reference = _between(own, reference)
    value = within_own.mean() + within_reference.mean() - 2 * between_own.mean()
    return Estimate(float(value), _centred(within_own - between_own), _centred(within_reference - between_reference))


def _within(of: FeatureSet) -> Array:
    """(N,): mean of the kernel between a picture and the others of its set."""
    found = np.empty(of.images)
    for rows, block in products(of, of):
        found[rows] = _kernel(block, of).sum(axis=1)
    return (found - _kernel(of.squares, of)) / (of.images - 1)


def _between(own: FeatureSet, reference: FeatureSet) -> tuple[Array, Array]:
    """(N,) and (M,): mean of the kernel between a picture of one set and those of the other."""
    of_own, of_reference = np.empty(own.images), np.zeros(reference.images)
    for rows, block in products(own, reference):
        kernel = _kernel(block, own)
        of_own[rows] = kernel.mean(axis=1)
        of_reference += kernel.sum(axis=0)
    return of_own, of_reference / own.images


def _kernel(inner: Array, of: FeatureSet) -> Array:
    base = inner / of.wide.shape[1] + 1
    kernel: Array = base * base * base  # several times as fast as a power
    return kernel


def _centred(values: Array) -> Array:
    """Twice the deviation from the mean: each picture stands in both places of a pair."""
    centred: Array = 2 * (values - values.mean())
    return centred
