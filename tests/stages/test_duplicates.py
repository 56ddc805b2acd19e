"""Duplicates: exactly those that comparing everything with everything finds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.select.duplicates import band_masks, near_duplicates, near_pairs, repeated


def by_hand(hashes: list[int], distance: int) -> list[bool]:
    kept: list[int] = []
    dropped = []
    for one in hashes:
        dropped.append(any((one ^ other).bit_count() <= distance for other in kept))
        if not dropped[-1]:
            kept.append(one)
    return dropped


def near_each_other(seed: int, count: int, flips: int) -> list[int]:
    """Hashes in chains: each a few flipped bits from one before it, so that being near is not transitive."""
    rng = np.random.default_rng(seed)
    hashes = [int(rng.integers(0, 2**64, dtype=np.uint64))]
    for _ in range(count - 1):
        one = hashes[int(rng.integers(len(hashes)))] if rng.random() < 0.8 else int(rng.integers(0, 2**64, dtype=np.uint64))
        for bit in rng.integers(0, 64, int(rng.integers(0, flips + 1))):
            one ^= 1 << int(bit)
        hashes.append(one)
    return hashes


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(0, 60), st.integers(0, 8))
def test_the_kept_are_those_of_the_plain_loop(seed: int, count: int, distance: int) -> None:
    hashes = near_each_other(seed, count, 8) if count else []
    assert near_duplicates(np.array(hashes, np.uint64), distance).tolist() == by_hand(hashes, distance)


@pytest.mark.parametrize(("count", "distance"), [(400, 0), (400, 4), (3000, 2), (3000, 8)])
def test_no_pair_is_missed(count: int, distance: int) -> None:
    hashes = np.array(near_each_other(count, count, distance), np.uint64)
    found = {(int(a), int(b)) for one, other in near_pairs(hashes, distance) for a, b in zip(one, other, strict=True)}
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None])
    assert found == {(int(a), int(b)) for a, b in np.argwhere(distances <= distance) if a < b}


@pytest.mark.parametrize("distance", range(9))
@pytest.mark.parametrize("count", [10, 10**5, 10**7])
def test_bands_cover_every_way_to_differ(count: int, distance: int) -> None:
    masks = band_masks(count, distance)
    bands = {int(mask) for mask in masks}
    assert np.bitwise_or.reduce(masks) == 2**64 - 1
    for seed in range(50):
        flipped = sum(1 << int(bit) for bit in np.random.default_rng(seed).choice(64, distance, replace=False))
        assert any(band & flipped == 0 for band in bands)


def test_repeated_contents_keep_their_first() -> None:
    contents = np.array([(7, 1), (2, 9), (7, 1), (7, 2), (2, 9), (1, 7)], np.uint64)
    assert repeated(contents[:0]).tolist() == []
    assert repeated(contents).tolist() == [False, False, True, False, True, False]


def test_one_crowded_cluster_is_no_matter_of_pairs() -> None:
    """Twenty thousand hashes within 3 bits of one another's centre, all equal ones collapsed."""
    rng = np.random.default_rng(0)
    flips = rng.integers(0, 64, (20_000, 1)).astype(np.uint64)
    hashes = np.uint64(12345) ^ (np.uint64(1) << flips[:, 0])
    hashes[0] = 12345
    assert np.flatnonzero(~near_duplicates(hashes, 1)).tolist() == [0]
