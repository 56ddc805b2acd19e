"""Paired distance and diversity, by a distance whose values are known."""

import numpy as np
import pytest
import torch
from torch import Tensor

from schemas.errors import BadInput
from stages.evaluate.metrics import perceptual
from stages.evaluate.metrics.perceptual import diversity, paired


def _brightness(first: Tensor, second: Tensor) -> Tensor:
    """Difference of the means, in levels of 0..255."""
    assert first.shape == second.shape
    assert first.shape[1] == 3
    return (first - second).mean(dim=(1, 2, 3)).abs() * 127.5


def _plain(*levels: int) -> list[np.ndarray]:
    return [np.full((4, 5, 3), level, np.uint8) for level in levels]


def test_paired_distance_is_that_of_equal_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual, "_BATCH", 2)
    found = paired(_plain(0, 10, 255), iter(_plain(0, 30, 250)), _brightness, "cpu")
    assert np.allclose(found, [0, 20, 5], atol=1e-3)
    with pytest.raises(ValueError, match="shorter"):
        paired(_plain(1, 2), _plain(1), _brightness, "cpu")


def test_diversity_is_the_mean_over_pairs_of_a_prompt_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of 0, 10, 40: 10, 40, 30. Of 100, 100, 100: none apart. Across prompts nothing is compared."""
    monkeypatch.setattr(perceptual, "_BATCH", 4)
    found = diversity(_plain(0, 10, 40, 100, 100, 100), 3, _brightness, "cpu")
    assert np.allclose(found, [25, 20, 35, 0, 0, 0], atol=1e-3)
    assert found[:3].mean() == pytest.approx((10 + 40 + 30) / 3, abs=1e-3)
    with pytest.raises(BadInput, match="expected at least 2"):
        diversity(_plain(1, 2), 1, _brightness, "cpu")


def test_pictures_reach_the_distance_in_minus_one_to_one() -> None:
    seen: list[Tensor] = []

    def remember(first: Tensor, second: Tensor) -> Tensor:
        seen.extend([first, second])
        return torch.zeros(len(first))

    paired(_plain(0), _plain(255), remember, "cpu")
    assert seen[0].unique().tolist() == [-1.0]
    assert seen[1].unique().tolist() == [1.0]
