"""Which of very many texts came before, in eight bytes a text."""

from typing import Final

import numpy as np
import pandas as pd
import pyarrow as pa

_HASH_KEY: Final = "diffusion-distil"
"""SipHash-2-4 takes 16 bytes."""
_GROWTH: Final = 2


class SeenTexts:
    """A set of texts, kept as 64-bit SipHashes in sorted runs.

    Memory: 8 bytes for every different text, 24 while the two longest runs are joined. Two different texts are taken for one with a probability of
    n^2 / 2^65: a hundred million texts lose one with a chance of 1 in 3,700.
    """

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []
        """Each longer than the next by `_GROWTH` or more, so there are few."""

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def add(self, texts: pa.StringArray) -> pa.BooleanArray:
        """Add the texts (no nulls) and return which of them were there, or came before in this array."""
        hashes = pd.util.hash_array(texts.to_numpy(zero_copy_only=False), hash_key=_HASH_KEY, categorize=False)
        different, first = np.unique(hashes, return_index=True)
        new = np.ones(len(different), bool)
        for run in self._runs:
            places = np.searchsorted(run, different)
            new &= run[np.minimum(places, len(run) - 1)] != different
        known = np.ones(len(hashes), bool)
        known[first[new]] = False
        self._keep(different[new])
        return pa.array(known)

    def _keep(self, run: np.ndarray) -> None:
        if not len(run):
            return
        while self._runs and len(self._runs[-1]) < _GROWTH * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")  # finds the two runs, so it takes time linear in their length
        self._runs.append(run)
