"""What drops a row by its metadata, before anything is downloaded. Each rule is a function from a batch to a mask; the first that hits is counted."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from infra.web import is_private_host
from schemas.data import IngestConfig

Rule = Callable[[pa.RecordBatch, IngestConfig], pa.BooleanArray]
"""True where the row is to be dropped."""


def no_http_url(batch: pa.RecordBatch, _config: IngestConfig) -> pa.BooleanArray:
    """No address, or one that is neither http nor https."""
    return pc.invert(_known(pc.match_substring_regex(batch["url"], r"^(?i:https?)://[^/?#\s]+[^\s]*$")))


def empty_caption(batch: pa.RecordBatch, _config: IngestConfig) -> pa.BooleanArray:
    """Nothing but white space."""
    return pc.invert(_known(pc.match_substring_regex(batch["caption"], r"[^\s\p{Z}]")))


def small(batch: pa.RecordBatch, config: IngestConfig) -> pa.BooleanArray:
    """The stated short side is not strictly above `min_side_px`. Rows that state none are for `select` to judge."""
    short = pc.min_element_wise(batch["width"], batch["height"], skip_nulls=True)
    return _known(pc.and_(pc.greater(short, 0), pc.less_equal(short, config.min_side_px)))


def unaesthetic(batch: pa.RecordBatch, config: IngestConfig) -> pa.BooleanArray:
    """The stated score is not strictly above `min_aesthetic`. Rows that state none are for `select` to judge."""
    if config.min_aesthetic is None:
        return pa.array([False] * batch.num_rows)
    return _known(pc.less_equal(batch["aesthetic"], config.min_aesthetic))


def private_address(batch: pa.RecordBatch, config: IngestConfig) -> pa.BooleanArray:
    """The host is a literal loopback or private address or a name for this machine. What names resolve to is checked by the downloader."""
    if config.allow_private_addresses:
        return pa.array([False] * batch.num_rows)
    return pa.array([url is not None and is_private_host(url) for url in batch["url"].to_pylist()])


RULES: Final[dict[str, Rule]] = {
    "no http url": no_http_url,
    "empty caption": empty_caption,
    "resolution": small,
    "aesthetic": unaesthetic,
    "private address": private_address,
}
DUPLICATE: Final = "duplicate url"


class MetadataFilter:
    """Applies the rules and drops repeated URLs. `seen` and `dropped` count as batches pass."""

    def __init__(self, config: IngestConfig) -> None:
        self.config = config
        self.seen = 0
        self.dropped: Counter[str] = Counter()
        self._urls: set[int] = set()

    def passing(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield what is left of each batch."""
        for whole in batches:
            self.seen += whole.num_rows
            batch = whole
            for name, rule in RULES.items():
                batch = self._without(batch, rule(batch, self.config), name)
            batch = self._without(batch, pa.array([self._is_known(url) for url in batch["url"].to_pylist()], pa.bool_()), DUPLICATE)
            if batch.num_rows:
                yield batch

    def counts(self) -> dict[str, int]:
        """Rows dropped by reason, those that hit only, in the order of the rules."""
        return {name: self.dropped[name] for name in (*RULES, DUPLICATE) if self.dropped[name]}

    def _without(self, batch: pa.RecordBatch, mask: pa.BooleanArray, name: str) -> pa.RecordBatch:
        hits = pc.sum(mask).as_py() or 0
        if not hits:
            return batch
        self.dropped[name] += hits
        return batch.filter(pc.invert(mask))

    def _is_known(self, url: str) -> bool:
        # 64 bits of a digest instead of the text: a billion addresses lose a handful of rows to chance, and memory stays bounded by their number.
        mark = int.from_bytes(hashlib.blake2b(url.encode(), digest_size=8).digest())
        if mark in self._urls:
            return True
        self._urls.add(mark)
        return False


def _known(mask: pa.BooleanArray) -> pa.BooleanArray:
    return pc.fill_null(mask, False)
