"""Rows of safetensors shards, any in any order, straight from the mapped files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor


class MappedShards:
    """The shards in a folder. Tensors stay on disk until they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards: dict[str, dict[str, Tensor]] = {}

    def gather(self, places: "Places", chosen: NDArray[np.int64], tensors: Sequence[str]) -> dict[str, Tensor]:
        """Rows `chosen` (B,) of those `tensors` that their shards hold, each (B, ...) float32, in the order of `chosen`."""
        shards, rows = places.shard[chosen], places.row[chosen]
        gathered: dict[str, Tensor] = {}
        for shard in np.unique(shards):
            at = torch.from_numpy(np.flatnonzero(shards == shard))
            here = torch.from_numpy(rows[at.numpy()])
            held = self._tensors(places.names[shard])
            for name in tensors:
                if name in held:
                    whole = held[name]
                    if name not in gathered:
                        gathered[name] = torch.empty(len(chosen), *whole.shape[1:])
                    gathered[name][at] = whole[here].float()
        return gathered

    def _tensors(self, shard: str) -> Mapping[str, Tensor]:
        if shard not in self._shards:
            self._shards[shard] = mapped(self._folder / shard)
        return self._shards[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}  # a process that is handed the set maps the files itself


class Places:
    """Where each entry of a set lies: the shard, and the row in it."""

    def __init__(self, names: list[str], shard: NDArray[Any], row: NDArray[Any]) -> None:
        """`shard` (N,) are positions in `names`, -1 for an entry that lies nowhere; `row` (N,) are rows of the shards."""
        self.names, self.shard, self.row = names, shard, row

    @classmethod
    def of(cls, index: pa.Table, shard: str, row: str) -> Self:
        """Of two columns of an index, the first read as a dictionary."""
        whole = index[shard].unify_dictionaries().combine_chunks()
        array = whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole
        return cls(array.dictionary.to_pylist(), array.indices.fill_null(-1).to_numpy(), index[row].to_numpy())

    def __len__(self) -> int:
        return len(self.row)

    def shards(self, chosen: NDArray[np.int64]) -> list[str]:
        """Names of the shards that entries `chosen` lie in, in the order of `names`."""
        return [self.names[shard] for shard in np.unique(self.shard[chosen]) if shard >= 0]


def checked_indices(indices: Sequence[int], size: int, what: str) -> NDArray[np.int64]:
    """The indices of entries of a set of `size`. Raises `IndexError` naming `what` for one outside it."""
    chosen = np.asarray(indices, np.int64)
    outside = chosen[(chosen < 0) | (chosen >= size)]
    if len(outside):
        raise IndexError(f"{what} {outside[0]}: expected 0 to {size - 1}")
    return chosen


def mapped(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file over the mapped file: pages are read when they are touched."""
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a safetensors handle is no dict
