"""Figures are those of the whole batch, however it is cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stages.training.figures import Figure, Spread, add_mean, scalars, shares_by_value, to_host

LEVELS = {10: "10", 249: "249", -1: "clean"}


def told(values: Tensor, levels: Tensor) -> dict[str, Figure]:
    right = values[:, 0] > 0
    return {"loss": values.mean(), "x0": Spread.of(values), **shares_by_value("accuracy", levels, LEVELS, right)}


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_a_cut_batch_has_the_figures_of_the_whole(seed: int, parts: int) -> None:
    source = torch.Generator().manual_seed(seed)
    values = torch.randn(12, 5, generator=source) * 3 + 1
    levels = torch.tensor([10, 249, -1])[torch.randint(0, 3, (12,), generator=source)]
    mean: dict[str, Tensor] = {}
    for part, at in zip(values.chunk(parts), levels.chunk(parts), strict=True):
        mean = add_mean(mean, told(part, at), parts)
    found = to_host(mean)
    expected = {"loss": float(values.mean()), "x0_mean": float(values.mean()), "x0_std": float(values.std(correction=0))}
    for level, label in LEVELS.items():
        here = values[levels == level, 0]
        if len(here):
            expected[f"accuracy_at_{label}"] = float((here > 0).float().mean())
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_what_is_not_finite_stays_so() -> None:
    """A deviation is rounded up to zero, never a NaN hidden by it."""
    for value in (float("nan"), float("inf")):
        found = to_host(scalars({"x0": Spread.of(torch.tensor([1.0, value]))}))
        assert not torch.isfinite(torch.tensor(found["x0_std"]))
    assert to_host(scalars({"x0": Spread.of(torch.full((7,), 0.1))}))["x0_std"] == pytest.approx(0, abs=1e-3)
