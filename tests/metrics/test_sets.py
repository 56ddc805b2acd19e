"""FID with influences, KID, precision and recall, density and coverage: closed forms and independent computations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import BadInput
from stages.evaluate.fid import FeatureStatistics, frechet_distance
from stages.evaluate.metrics import sets
from stages.evaluate.metrics.bootstrap import Estimate, Resampling, draws, interval
from stages.evaluate.metrics.frechet import frechet
from stages.evaluate.metrics.kid import kid
from stages.evaluate.metrics.neighbours import density_coverage, precision_recall
from stages.evaluate.metrics.sets import FeatureSet


def _gaussian(seed: int, images: int, dimensions: int, shift: float = 0.0, scale: float = 1.0) -> FeatureSet:
    return FeatureSet(shift + scale * np.random.default_rng(seed).normal(size=(images, dimensions)))


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def _weighted_fid(first: np.ndarray, one: np.ndarray, second: np.ndarray, two: np.ndarray) -> float:
    """FID of weighted pictures, by float64 eigendecompositions of Tr (S1^(1/2) S2 S1^(1/2))^(1/2); weights with mean 1."""

    def statistics(features: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = weights @ features / weights.sum()
        centred = features - mean
        return mean, (centred * weights[:, None]).T @ centred / (len(features) - 1) * len(features) / weights.sum()

    (mean_one, cov_one), (mean_two, cov_two) = statistics(first, one), statistics(second, two)
    half = _root(cov_one)
    cross = np.trace(_root(half @ cov_two @ half))
    return float(((mean_one - mean_two) ** 2).sum() + np.trace(cov_one) + np.trace(cov_two) - 2 * cross)


# FID


@pytest.mark.parametrize(("images", "dimensions"), [(200, 16), (300, 40), (24, 60)])
def test_fid_is_that_of_an_independent_eigendecomposition(images: int, dimensions: int) -> None:
    one, two = _gaussian(0, images, dimensions), _gaussian(1, images + 7, dimensions, 0.5, 1.7)
    expected = _weighted_fid(one.features, np.ones(images), two.features, np.ones(images + 7))
    assert frechet(one, two).value == pytest.approx(expected, rel=1e-6)
    assert frechet(one, two).value == pytest.approx(frechet_distance(one.statistics, two.statistics), rel=1e-9)


def test_fid_of_large_samples_comes_to_that_of_their_gaussians() -> None:
    """|mu|^2 + sum (s1 - s2)^2 = 4 * .25 + 4 * .25."""
    found = frechet(_gaussian(0, 200_000, 4), _gaussian(1, 200_000, 4, 0.5, 1.5)).value
    assert found == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize(("images", "dimensions"), [(30, 6), (12, 20)])
def test_influence_is_the_derivative_by_a_pictures_weight(images: int, dimensions: int) -> None:
    one, two = _gaussian(2, images, dimensions), _gaussian(3, images + 3, dimensions, 0.4, 1.3)
    found = frechet(one, two)
    assert found.reference is not None
    for own, number in ((True, 0), (True, 5), (False, 2)):
        values = []
        for change in (1e-2, -1e-2):
            weights = [np.ones(images), np.ones(images + 3)]
            weights[not own][number] += change
            values.append(_weighted_fid(one.features, weights[0], two.features, weights[1]))
        slope = (values[0] - values[1]) / 2e-2 * (images if own else images + 3)
        assert (found.own if own else found.reference)[number] == pytest.approx(slope, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize(("images", "dimensions", "shift"), [(150, 6, 1.0), (40, 80, 1.0)])
def test_the_interval_of_fid_is_as_wide_as_fid_varies(images: int, dimensions: int, shift: float) -> None:
    """Against the standard deviation over independent samples, with more pictures than features and with fewer."""
    values, deviations = [], []
    for number in range(120):
        one, two = _gaussian(2 * number, images, dimensions), _gaussian(2 * number + 1, images, dimensions, shift, 1.3)
        found = frechet(one, two)
        assert found.reference is not None
        values.append(found.value)
        deviations.append(np.sqrt(found.own.var() / images + found.reference.var() / images))
    assert np.mean(deviations) == pytest.approx(np.std(values), rel=0.2)  # the latter is itself known to 6.5 %


# KID


def test_kid_of_a_few_points_is_the_closed_form() -> None:
    """One dimension, kernel (xy + 1)^3. Own 0, 1: 1. Reference 2, 3: 343. Between: mean of 1, 1, 27, 64."""
    found = kid(FeatureSet(np.array([[0.0], [1.0]])), FeatureSet(np.array([[2.0], [3.0]])))
    assert found.value == pytest.approx(1 + 343 - 2 * 93 / 4, rel=1e-12)


def test_kid_of_gaussians_is_the_closed_form() -> None:
    """The kernel in one dimension is 1 + 3xy + 3x^2y^2 + x^3y^3: the distance is 3 d1^2 + 3 d2^2 + d3^2 for differences of the moments."""
    shift, scale = 0.3, 1.2
    moments = np.array([shift, shift**2 + scale**2 - 1, shift**3 + 3 * shift * scale**2])
    expected = float(np.array([3, 3, 1]) @ moments**2)
    found = np.array([kid(_gaussian(2 * n, 400, 1), _gaussian(2 * n + 1, 400, 1, shift, scale)).value for n in range(60)])
    assert found.mean() == pytest.approx(expected, abs=4 * found.std() / np.sqrt(60))
    assert found.std() / np.sqrt(60) < 0.1 * expected
    same = np.array([kid(_gaussian(2 * n, 50, 3), _gaussian(2 * n + 1, 50, 3)).value for n in range(200)])
    assert abs(same.mean()) < 4 * same.std() / np.sqrt(200), "no bias where both are of one distribution"
    assert same.min() < 0


@settings(max_examples=15)
@given(st.integers(0, 2**32), st.integers(2, 12), st.integers(2, 12), st.integers(1, 5))
def test_kid_is_the_sum_over_pairs_and_does_not_see_blocks(seed: int, images: int, others: int, dimensions: int) -> None:
    one, two = _gaussian(seed, images, dimensions), _gaussian(seed + 1, others, dimensions, 0.5)
    x, y = one.features, two.features

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / dimensions + 1) ** 3)

    within = [sum(kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j) / len(z) / (len(z) - 1) for z in (x, y)]
    expected = sum(within) - 2 * sum(kernel(a, b) for a in x for b in y) / images / others
    whole = kid(one, two)
    assert whole.value == pytest.approx(expected, rel=1e-9, abs=1e-9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sets, "_BLOCK", 5)
        small = kid(FeatureSet(x), FeatureSet(y))  # new ones: what was computed for the others is kept
    assert small.value == pytest.approx(whole.value, rel=1e-9, abs=1e-9)
    assert np.allclose(small.own, whole.own)


def test_the_interval_of_kid_is_as_wide_as_kid_varies() -> None:
    values, deviations = [], []
    for number in range(120):
        found = kid(_gaussian(2 * number, 80, 4), _gaussian(2 * number + 1, 60, 4, 0.7))
        assert found.reference is not None
        values.append(found.value)
        deviations.append(np.sqrt(found.own.var() / 80 + found.reference.var() / 60))
    assert np.mean(deviations) == pytest.approx(np.std(values), rel=0.2)


# Precision, recall, density, coverage


def _line(*places: float) -> FeatureSet:
    return FeatureSet(np.array(places)[:, None])


def test_precision_and_recall_of_points_on_a_line() -> None:
    """Reference 0, 1, .. 7: the third neighbour is 2 away inside and 3 at the ends. The set: 4 points at 3, and 4 far off."""
    reference, own = _line(*range(8)), _line(3.0, 3.1, 3.2, 3.3, 100, 100.1, 100.2, 100.3)
    found = precision_recall(own, reference)
    assert found["precision"].value == 0.5
    assert found["recall"].value == 1 / 8  # 3 itself: the set's balls near it are .3 and .2 wide
    assert found["recall"].reference is not None
    assert not found["recall"].own.any(), "the manifold is held fixed"


def test_density_and_coverage_of_points_on_a_line() -> None:
    """Reference 0..9: the fifth neighbour of k is 5, 4, 3, 3, 3, 3, 3, 3, 4, 5 away. One point at -4, five at 20: the ball of 0 holds the first."""
    reference, own = _line(*range(10)), _line(-4.0, 20, 21, 22, 23, 24)
    found = density_coverage(own, reference)
    assert found["coverage"].value == pytest.approx(1 / 10)
    assert found["density"].value == pytest.approx(1 / 5 / 6)


def test_fidelity_and_diversity_fail_apart() -> None:
    """A set that is one of two modes is precise and does not recall; a set of more than them recalls and is not precise."""
    random = np.random.default_rng(0)
    two = np.concatenate([random.normal(-20, 1, (60, 3)), random.normal(20, 1, (60, 3))])
    dropped, invented = FeatureSet(random.normal(-20, 1, (120, 3))), np.concatenate([random.normal(0, 1, (60, 3)), two[:120:2] + 0.01])
    modes = FeatureSet(two)
    narrow, wide = precision_recall(dropped, modes), precision_recall(FeatureSet(invented), modes)
    assert narrow["precision"].value > 0.8
    assert narrow["recall"].value <= 0.5
    assert wide["recall"].value > 0.8
    assert wide["precision"].value <= 0.5
    assert density_coverage(dropped, modes)["coverage"].value <= 0.5
    assert density_coverage(modes, modes)["coverage"].value == 1


def test_too_few_images_for_a_manifold_are_one_clear_error() -> None:
    with pytest.raises(BadInput, match="manifold of 3 images with 3 nearest neighbours"):
        precision_recall(_line(0, 1, 2), _line(0, 1, 2, 3, 4))
    with pytest.raises(BadInput, match="4 and 3 dimensions"):
        kid(_gaussian(0, 5, 4), _gaussian(0, 5, 3))
    with pytest.raises(BadInput, match="at least 2 images"):
        FeatureSet(np.zeros((1, 4)))


# Intervals


def test_the_bootstrap_of_a_mean_has_its_standard_error_and_covers() -> None:
    random = np.random.default_rng(0)
    held = 0
    for number in range(150):
        values = random.exponential(1.0, 100)
        drawn = draws(Estimate.of_mean(values), Resampling.of_pictures(100, 300, number))
        assert drawn.std() == pytest.approx(values.std() / 10, rel=0.15)
        low, high = interval(drawn, 0.95)
        held += low <= 1.0 <= high
    assert 0.88 <= held / 150 <= 0.98  # of a skewed distribution the percentiles hold a little less than they say


def test_pictures_of_one_prompt_are_drawn_together() -> None:
    """20 prompts with 8 equal pictures each: as uncertain as 20 numbers, not as 160."""
    values = np.random.default_rng(1).normal(size=20)
    of_prompts = Resampling.of_prompts([f"prompt {number}" for number in range(20) for _ in range(8)], 4000, 0)
    drawn = draws(Estimate.of_mean(np.repeat(values, 8)), of_prompts)
    assert drawn.std() == pytest.approx(values.std() / np.sqrt(20), rel=0.05)
    assert drawn.mean() == pytest.approx(values.mean(), abs=0.02)


def test_a_shared_reference_moves_both_sides_of_a_difference() -> None:
    """The same draws for two metrics that lean on one set in the same way: their difference does not see it."""
    influence = np.random.default_rng(2).normal(size=30)
    one, two = (Estimate(value, np.zeros(30), influence - influence.mean()) for value in (1.0, 3.0))
    own, reference = Resampling.of_pictures(30, 200, 0), Resampling.of_pictures(30, 200, 1)
    difference = draws(two, own, reference) - draws(one, own, reference)
    assert np.allclose(difference, 2.0)
    assert draws(one, own, reference).std() > 0.05
    assert np.array_equal(draws(one, own), np.full(200, 1.0)), "held fixed without a resampling of its own"


def test_statistics_are_those_of_fid() -> None:
    random = np.random.default_rng(0)
    for images, dimensions in ((9, 4), (4, 9)):
        of = FeatureSet(random.normal(size=(images, dimensions)))
        factor = FeatureStatistics.of(of.features).factor
        back = of.coordinates(np.eye(factor.shape[1])) @ factor.T
        assert np.allclose(back, of.centred)
