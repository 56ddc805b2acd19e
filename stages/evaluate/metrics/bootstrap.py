"""Percentile intervals by the bootstrap (Efron, 1979), over prompts.

What is drawn again with replacement are prompts, so that pictures of one prompt, which are not independent, come and go together. A metric hands
over its value and the influence of every picture: the change of the value, to first order, with that picture's weight (the infinitesimal
jackknife's derivative). For means that is the bootstrap itself. For distances between sets it stands in for computing the metric of every drawn
set, and must: a set drawn with replacement has fewer distinct pictures, on which FID is higher by far more than it varies (of 60 pictures with
200 features of one distribution 4.7 instead of 3.6, where the standard deviation is .09), so that the plain percentiles would not even hold the
value; and each would cost a matrix root of 2048 dimensions. Where two sets are of one distribution the first order is not all: the interval is
then wider than needed (.13 instead of .09 in that case).

An interval is that of the figure for this number of pictures. How far that is from its limit for many, which is most of a FID of few, it does not
say.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.training.randomness import derive_seed

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A metric's value, and what it would be with other weights of the pictures: value + mean of the influences under those weights."""

    value: float
    own: Array
    """(N,), mean zero: influence of the pictures that are measured."""
    reference: Array | None = None
    """(M,), mean zero: influence of the pictures they are measured against; None where there are none, or they are held fixed."""

    @classmethod
    def of_mean(cls, values: ArrayLike) -> Self:
        """The mean of one number a picture, (N,)."""
        numbers = np.asarray(values, np.float64)
        return cls(float(numbers.mean()), numbers - numbers.mean())

    def scaled(self, factor: float) -> "Estimate":
        """The same in another unit."""
        return Estimate(factor * self.value, factor * self.own, None if self.reference is None else factor * self.reference)


@dataclass(frozen=True, eq=False)
class Resampling:
    """How often each prompt is drawn, in every resample. One for all rows of a table, so that differences of rows can be taken draw by draw."""

    groups: NDArray[np.intp]
    """(N,): number of the prompt of every picture, from 0."""
    resamples: int
    seed: int

    @classmethod
    def of_prompts(cls, prompts: ArrayLike, resamples: int, seed: int) -> Self:
        """Pictures with equal entries of `prompts`, (N,), are drawn together."""
        _, groups = np.unique(np.asarray(prompts), return_inverse=True)
        return cls(groups, resamples, seed)

    @classmethod
    def of_pictures(cls, pictures: int, resamples: int, seed: int) -> Self:
        """Every picture by itself."""
        return cls(np.arange(pictures), resamples, seed)

    @cached_property
    def counts(self) -> NDArray[np.uint16]:
        """(resamples, prompts)."""
        prompts = int(self.groups.max()) + 1
        random = np.random.default_rng(derive_seed(self.seed, "bootstrap"))
        drawn = np.empty((self.resamples, prompts), np.uint16)
        for row in drawn:
            row[:] = np.bincount(random.integers(prompts, size=prompts), minlength=prompts)
        return drawn

    def means(self, influence: Array) -> Array:
        """(resamples,): weighted mean of one number a picture, (N,), in every resample."""
        sums, sizes = np.bincount(self.groups, influence), np.bincount(self.groups)
        weights = self.counts.astype(np.float64)
        found: Array = (weights @ sums) / (weights @ sizes)
        return found


def draws(estimate: Estimate, own: Resampling, reference: Resampling | None = None) -> Array:
    """(resamples,): the metric in every resample.

    `reference` resamples the pictures measured against: the same as `own` where these are of the same prompts, picture by picture, else one of
    their own. None: they are held fixed.
    """
    found = estimate.value + own.means(estimate.own)
    if reference is not None and estimate.reference is not None:
        found = found + reference.means(estimate.reference)
    return found


def interval(drawn: Array, confidence: float) -> tuple[float, float]:
    """Lower and upper percentile that hold the share `confidence` of the draws."""
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
