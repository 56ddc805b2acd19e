"""Data order, slices and noise as functions of (seed, step, position)."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.training import Draw, Parallel, generator
from stages.training.data import indices

CPU = torch.device("cpu")


@settings(max_examples=50)
@given(seed=st.integers(0, 2**63 - 1), size=st.integers(1, 40), batch=st.integers(1, 17), epochs=st.integers(1, 3))
def test_each_epoch_is_a_permutation_however_batches_lie(seed: int, size: int, batch: int, epochs: int) -> None:
    steps = -(-size * epochs // batch)
    order = [index for step in range(steps) for index in indices(seed, step, batch, size)]
    for epoch in range(epochs):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(size))


@settings(max_examples=50)
@given(world=st.integers(1, 6), accumulation=st.integers(1, 5), size=st.integers(1, 4))
def test_processes_and_micro_batches_partition_the_global_batch(world: int, accumulation: int, size: int) -> None:
    batch = world * accumulation * size
    positions = [p for rank in range(world) for micro in Parallel(rank, world).micro_batches(batch, accumulation) for p in micro]
    assert positions == list(range(batch))


@settings(max_examples=25)
@given(seed=st.integers(0, 2**63 - 1), step=st.integers(0, 10**6), cut=st.integers(1, 7))
def test_a_samples_numbers_do_not_depend_on_its_company(seed: int, step: int, cut: int) -> None:
    whole = Draw(seed, (step,), range(8), CPU)
    parts = [Draw(seed, (step,), range(cut), CPU), Draw(seed, (step,), range(cut, 8), CPU)]
    assert torch.equal(whole.normal("noise", (4, 3, 3)), torch.cat([part.normal("noise", (4, 3, 3)) for part in parts]))
    assert torch.equal(whole.integers("timestep", 50), torch.cat([part.integers("timestep", 50) for part in parts]))
    assert torch.equal(whole.uniform("w", 3, 15), torch.cat([part.uniform("w", 3, 15) for part in parts]))


def test_numbers_differ_by_seed_step_purpose_player_and_position() -> None:
    draw = Draw(1, (2,), range(2), CPU)
    first = draw.normal("noise", (8,))
    others = [draw.normal("other", (8,)), draw.fold("student").normal("noise", (8,)), Draw(2, (2,), range(2), CPU).normal("noise", (8,))]
    others.append(Draw(1, (3,), range(2), CPU).normal("noise", (8,)))
    assert all(not torch.equal(first, other) for other in others)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first, draw.normal("noise", (8,)))
    assert generator(1, 1).initial_seed() != generator(1, "1").initial_seed()


def test_numbers_have_their_distributions() -> None:
    draw = Draw(3, (0,), range(4000), CPU)
    normal, uniform, integers = draw.normal("a", (4,)), draw.uniform("b", 2, 6), draw.integers("c", 5)
    assert abs(float(normal.mean())) < 0.03
    assert abs(float(normal.std()) - 1) < 0.03
    assert 2 <= float(uniform.min()) < 2.01
    assert 5.99 < float(uniform.max()) < 6
    assert (torch.bincount(integers, minlength=5) > 700).all()
