"""Which pictures show what another one shows. Everything is over whole columns, in memory that grows with the number of pictures, not of pairs."""

from collections.abc import Iterator
from itertools import combinations
from math import comb
from typing import Final

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Indices = NDArray[np.intp]
Mask = NDArray[np.bool_]

_BITS: Final = 64
_SORTING: Final = 10.0  # what sorting one hash costs, in comparisons of two
_MIX: Final = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplied by it, the upper bits of a product depend on all bits of the factor (Knuth)


def repeated(contents: NDArray[np.uint64]) -> Mask:
    """True for every row of (N, 2) that is equal to one before it."""
    order = np.lexsort((contents[:, 1], contents[:, 0]))  # stable: of equal rows the first comes first
    mask = np.zeros(len(contents), bool)
    mask[order[1:]] = (contents[order[1:]] == contents[order[:-1]]).all(axis=1)
    return mask


def near_duplicates(hashes: Hashes, max_distance: int) -> Mask:
    """True for every hash (N,) that has, before it, a kept one at a Hamming distance of at most `max_distance`.

    The order is that of preference: the first is kept, then each that no kept one before it is near to. The result is that of comparing
    every hash with every kept one.
    """
    first = np.unique(hashes, return_index=True)[1]
    dropped = np.ones(len(hashes), bool)
    dropped[first] = (
        False  # an equal hash has equal neighbours: whatever the first one meets, the others meet it, or are near to the first one
    )
    undecided = np.sort(first)
    while len(undecided):
        left_over = hashes[undecided]
        best = np.arange(len(undecided))
        for earlier, later in near_pairs(left_over, max_distance):
            np.minimum.at(best, later, earlier)
        # A hash is kept once none of its neighbours before it is undecided. Those that stay without neighbours at all are most of them.
        kept = best == np.arange(len(undecided))
        lost = np.zeros(len(undecided), bool)
        if not kept.all():
            for earlier, later in near_pairs(left_over, max_distance):
                lost[later[kept[earlier]]] = True
        dropped[undecided[lost]] = True
        undecided = undecided[~kept & ~lost]
    return dropped


def near_pairs(hashes: Hashes, max_distance: int) -> Iterator[tuple[Indices, Indices]]:
    """Yield every pair of positions (earlier, later) at a Hamming distance of at most `max_distance`, in batches, some of them repeatedly.

    Cut in `max_distance` + k bands, two such hashes agree in at least k of them (the pigeonhole principle): so those that agree in the bits of
    any k bands are compared, and none is missed. k is what takes least work for so many hashes.
    """
    low = np.uint64(max(1, (len(hashes) - 1).bit_length()))
    positions = np.arange(len(hashes), dtype=np.uint64)
    for mask in band_masks(len(hashes), max_distance):
        # Key and position in one word: sorting words takes a tenth of the time of an argsort. Keys that collide are compared like equal ones.
        packed = np.sort(((hashes & mask) * _MIX >> low << low) | positions)
        order = (packed & np.uint64((1 << int(low)) - 1)).astype(np.intp)
        equal = packed[1:] >> low == packed[:-1] >> low
        start = np.flatnonzero(equal)  # position i stands for the pair (i, i + offset) of the sorted hashes
        offset = 1
        while len(start):
            one, other = order[start], order[start + offset]
            near = np.bitwise_count(hashes[one] ^ hashes[other]) <= max_distance
            if near.any():
                yield one[near], other[near]  # sorted by key, then position
            start = start[start + offset < len(equal)]
            start = start[equal[start + offset]]
            offset += 1


def band_masks(count: int, max_distance: int) -> list[np.uint64]:
    """Bits in which hashes must agree to be compared: one mask for every choice of k of `max_distance` + k bands."""
    agreeing = min(range(1, 6), key=lambda k: _work(count, max_distance, k))
    bands = max_distance + agreeing
    # Every so-manieth bit: neighbouring bits of a perceptual hash go together, and would make bands that many hashes share.
    masks = [sum(1 << bit for bit in range(band, _BITS, bands)) for band in range(bands)]
    return [np.uint64(sum(chosen)) for chosen in combinations(masks, agreeing)]


def _work(count: int, max_distance: int, agreeing: int) -> float:
    """Comparisons to be expected of hashes whose bits are independent."""
    bits = _BITS * agreeing / (max_distance + agreeing)
    return comb(max_distance + agreeing, agreeing) * count * (_SORTING + count / 2**bits / 2)
