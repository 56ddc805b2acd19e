"""Which picture goes into which shard and row: the selected pictures shuffled once by the seed, so that every shard is a random sample.

Two ways lead to a shuffled set on object storage. Two passes write every picture a second time, cut into shuffled pieces, and read it again:
twice the traffic and as much space again as the pictures take. One pass reads each picture where it lies by one range of its shard: one
request a picture (a few per second for each thread, thousands in all), no byte moved twice and none kept on disk. Encoding does tens of
pictures a second on a device, so requests never are what it waits for: the one pass is taken.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from schemas.data import AspectConfig
from schemas.errors import BadInput, RunFailed

_LISTED_KEYS: Final = 2**16


@dataclass(frozen=True)
class Order:
    """The order, written down: row group n of the parquet file at `path` is what goes into shard n.

    Its columns are those of `stages.selected.SelectedPictures.table` and `text_shard`, `text_row`, `text_new`: where the embedding of the
    caption lies, and whether this sample is the first that has it, with which it is stored.
    """

    path: Path
    samples: int
    shards: int
    captions: int
    """Distinct captions."""

    shard_samples: int

    def shard_rows(self, number: int) -> int:
        """Samples of one shard."""
        return min(self.shard_samples, self.samples - number * self.shard_samples)

    def shard(self, number: int) -> pa.Table:
        """The rows of one shard."""
        with pq.ParquetFile(self.path) as file:
            return file.read_row_group(number)


def write_order(pictures: pa.Table, path: Path, *, seed: int, shard_samples: int) -> Order:
    """Shuffle the pictures and write the order to `path`."""
    order = shuffled(pictures["key"], seed)
    texts = text_places(pictures["caption"], order, shard_samples)
    starts = range(0, len(order), shard_samples)
    writer: pq.ParquetWriter | None = None
    for start in starts:
        rows = pictures.take(pa.array(order[start : start + shard_samples]))
        for name, values in texts.items():
            rows = rows.append_column(name, pa.array(values[start : start + shard_samples]))
        writer = writer or pq.ParquetWriter(path, rows.schema)
        writer.write_table(rows, row_group_size=shard_samples)
    assert writer is not None, "an empty set is refused before"
    writer.close()
    return Order(path, len(order), len(starts), int(texts["text_new"].sum()), shard_samples)


def shuffled(keys: pa.ChunkedArray, seed: int) -> NDArray[np.int64]:
    """Rows in the order of the digests of (seed, key): a shuffle that no library's version can change."""
    start = hashlib.sha256(f"{seed}:".encode())
    digests = np.empty(len(keys), np.uint64)
    for first in range(0, len(keys), _LISTED_KEYS):
        for row, key in enumerate(keys.slice(first, _LISTED_KEYS).to_pylist(), first):
            hasher = start.copy()
            hasher.update(key.encode())
            digests[row] = int.from_bytes(hasher.digest()[:8])
    return np.argsort(digests, kind="stable")


def text_places(captions: pa.ChunkedArray, order: NDArray[np.int64], shard_samples: int) -> dict[str, NDArray[np.generic]]:
    """For every sample in order where its caption's embedding lies: with the first sample of the whole set that has that caption.

    So every distinct caption is encoded and stored once, in a shard that any process can make alone.
    """
    codes = pc.dictionary_encode(captions).combine_chunks()
    caption = np.asarray(codes.indices if isinstance(codes, pa.DictionaryArray) else codes.chunk(0).indices)[order]
    first = np.unique(caption, return_index=True)[1][caption]  # of every sample the first that has its caption
    sample = np.arange(len(order))
    is_new = first == sample
    shard = sample // shard_samples
    before = np.concatenate([[0], np.cumsum(is_new)])  # new captions before each sample
    row_if_new = before[:-1] - before[shard * shard_samples]
    return {"text_shard": shard[first].astype(np.int32), "text_row": row_if_new[first].astype(np.int32), "text_new": is_new}


def without_elongated(pictures: pa.Table, aspect: AspectConfig) -> tuple[pa.Table, dict[str, int]]:
    """Leave out pictures beyond `aspect.max_ratio`; return the others and the count by reason. Raises `RunFailed` when none is left."""
    if aspect.max_ratio is None:
        return pictures, {}
    long_side, short = (choose(pictures["width"], pictures["height"]) for choose in (pc.max_element_wise, pc.min_element_wise))
    fits = pc.less_equal(pc.cast(long_side, pa.float64()), pc.multiply(pc.cast(short, pa.float64()), aspect.max_ratio))
    kept = pictures.filter(fits)
    if not kept.num_rows:
        raise RunFailed(
            f"encode: all {pictures.num_rows} selected images are more elongated than encode.aspect.max_ratio = {aspect.max_ratio}"
        )
    dropped = pictures.num_rows - kept.num_rows
    return kept.combine_chunks(), {"aspect ratio": dropped} if dropped else {}


def check_sizes(pictures: pa.Table, side: int) -> None:
    """Raise `BadInput` before anything is encoded when a selected picture would have to be enlarged."""
    small = pictures.filter(pc.less(pc.min_element_wise(pictures["width"], pictures["height"]), side))
    if small.num_rows:
        first = small.slice(0, 1).to_pylist()[0]
        raise BadInput(
            f"encode.resolution_px = {side}: {small.num_rows} selected images are smaller, the first {first['key']} with "
            f"{first['width']} x {first['height']} pixels; expected select.min_side_px of at least {side - 1}, or a smaller resolution"
        )
