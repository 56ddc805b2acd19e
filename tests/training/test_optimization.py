"""Learning-rate schedules."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schemas.training import OptimizerConfig
from stages.training import Player
from stages.training.optimization import learning_rate


def player(shape: str, updates: int, warmup: int) -> Player:
    return Player({}, OptimizerConfig(learning_rate=2.0), updates, lr_schedule=shape, warmup_steps=warmup)  # type: ignore[arg-type]


def rates(shape: str, updates: int, warmup: int) -> list[float]:
    return [learning_rate(player(shape, updates, warmup), update) for update in range(updates)]


def test_anchors() -> None:
    assert rates("constant", 4, 2) == [1, 2, 2, 2]
    assert rates("linear", 7, 2) == pytest.approx([1, 2, 2, 1.5, 1, 0.5, 0])
    assert rates("cosine", 5, 0) == pytest.approx([2, 1.7071067811865475, 1, 0.2928932188134524, 0])


@given(st.sampled_from(["constant", "cosine", "linear"]), st.integers(1, 60), st.data())
def test_rises_then_never_rises_and_ends_at_zero(shape: str, updates: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, updates - 1))
    values = rates(shape, updates, warmup)
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    assert max(values) == pytest.approx(2.0)
    if shape != "constant" and updates - 1 > warmup:
        assert values[-1] == pytest.approx(0, abs=1e-12)


def test_cosine_without_warm_up_is_torchs_own() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=2.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
    for expected in rates("cosine", 10, 0):
        assert schedule.get_last_lr()[0] == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        schedule.step()
