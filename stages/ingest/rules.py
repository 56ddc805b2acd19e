"""What drops a row by its metadata, before anything is downloaded. Each rule is a function from a batch to a mask.

A row is counted under the first rule that hits, in the order of `RULES`: cheap ones first. The rules of numbers look at whole batches; those of texts
only at what these leave, and repeated URLs are looked for last.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.web_addresses import is_private_host
from schemas.data import IngestConfig
from stages.ingest.seen import SeenTexts

Rule = Callable[[pa.RecordBatch, IngestConfig], pa.BooleanArray | None]
"""True where the row is to be dropped; None where the rule is off or the table says nothing. What a row does not state never drops it."""


def small(batch: pa.RecordBatch, config: IngestConfig) -> pa.BooleanArray | None:
    """The stated short side is not strictly above `min_side_px`. Sides that are not positive state nothing."""
    masks = [_known(pc.and_(pc.less_equal(batch[side], config.min_side_px), pc.greater(batch[side], 0))) for side in ("width", "height")]
    return pc.or_(*masks)


def unaesthetic(batch: pa.RecordBatch, config: IngestConfig) -> pa.BooleanArray | None:
    """The stated score is not strictly above `min_aesthetic`."""
    return None if config.min_aesthetic is None else _known(pc.less_equal(batch["aesthetic"], config.min_aesthetic))


def watermarked(batch: pa.RecordBatch, config: IngestConfig) -> pa.BooleanArray | None:
    """The stated probability of a watermark is not strictly below `max_watermark`."""
    return None if config.max_watermark is None else _known(pc.greater_equal(batch["watermark"], config.max_watermark))


def unsafe(batch: pa.RecordBatch, config: IngestConfig) -> pa.BooleanArray | None:
    """The stated probability of unsafe content is not strictly below `max_unsafe`."""
    return None if config.max_unsafe is None else _known(pc.greater_equal(batch["unsafe"], config.max_unsafe))


def dissimilar(batch: pa.RecordBatch, config: IngestConfig) -> pa.BooleanArray | None:
    """The stated similarity of picture and caption is below `min_similarity`."""
    return None if config.min_similarity is None else _known(pc.less(batch["similarity"], config.min_similarity))


def nsfw_label(batch: pa.RecordBatch, config: IngestConfig) -> pa.BooleanArray | None:
    """The stated label is one of `drop_nsfw`, whatever its case."""
    if not config.drop_nsfw or batch["nsfw"].null_count == batch.num_rows:
        return None
    labels = pa.array([normalised_label(label) for label in config.drop_nsfw], pa.string())
    return pc.is_in(pc.ascii_upper(pc.ascii_trim_whitespace(batch["nsfw"])), labels)


def no_http_url(batch: pa.RecordBatch, _config: IngestConfig) -> pa.BooleanArray | None:
    """No address, or one that is neither http nor https."""
    return pc.invert(_known(pc.match_substring_regex(batch["url"], r"^(?i:https?)://[^/?#\s]+[^\s]*$")))


_PLAIN_HOST: Final = r"^(?i:https?://(?:[a-z0-9_-]+\.)+[a-z]+(?::[0-9]+)?(?:[/?#]|$))"
_SPECIAL_NAME: Final = r"^(?i:https?)://[^/?#]*\.(?i:local|localhost|internal|localdomain|arpa)(?:[:/?#]|$)"


def private_address(batch: pa.RecordBatch, config: IngestConfig) -> pa.BooleanArray | None:
    """The host is a literal loopback or private address or a name for this machine. What names resolve to is checked by the downloader."""
    if config.allow_private_addresses:
        return None
    # Names under an alphabetic top level domain are no literal addresses; the few others are parsed one by one.
    plain = pc.and_not(pc.match_substring_regex(batch["url"], _PLAIN_HOST), pc.match_substring_regex(batch["url"], _SPECIAL_NAME))
    mask = np.zeros(batch.num_rows, bool)
    for row in np.flatnonzero(~_known(plain).to_numpy(zero_copy_only=False)):
        mask[row] = is_private_host(batch["url"][int(row)].as_py())
    return pa.array(mask)


def empty_caption(batch: pa.RecordBatch, _config: IngestConfig) -> pa.BooleanArray | None:
    """Nothing but white space."""
    return pc.invert(_known(pc.match_substring_regex(batch["caption"], r"[^\s\p{Z}]")))


def broken_text(batch: pa.RecordBatch, _config: IngestConfig) -> pa.BooleanArray | None:
    """Caption or label are not UTF-8, which parquet files promise and do not check. Such a URL has no right form already."""
    masks = [_not_utf8(batch[name]) for name in ("caption", "nsfw")]
    found = [mask for mask in masks if mask is not None]
    return None if not found else found[0] if len(found) == 1 else pc.or_(*found)


NUMBER_RULES: Final[Mapping[str, Rule]] = {
    "resolution": small,
    "aesthetic": unaesthetic,
    "watermark": watermarked,
    "unsafe": unsafe,
    "similarity": dissimilar,
}
TEXT_RULES: Final[Mapping[str, Rule]] = {
    "nsfw": nsfw_label,
    "no http url": no_http_url,
    "private address": private_address,
    "empty caption": empty_caption,
    "broken text": broken_text,
}
RULES: Final[Mapping[str, Rule]] = {**NUMBER_RULES, **TEXT_RULES}
DUPLICATE: Final = "duplicate url"


class MetadataFilter:
    """Applies the rules and drops repeated URLs. `seen` and `dropped` count as batches pass.

    Memory: what `SeenTexts` takes for the URLs that pass, and a batch.
    """

    def __init__(self, config: IngestConfig) -> None:
        self.config = config
        self.seen = 0
        self.dropped: Counter[str] = Counter()
        self._urls = SeenTexts()

    def passing(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield what is left of each batch."""
        for whole in batches:
            self.seen += whole.num_rows
            batch = self._without(whole, NUMBER_RULES)
            for name, rule in TEXT_RULES.items():
                if batch.num_rows:
                    batch = self._without(batch, {name: rule})
            if batch.num_rows:
                batch = self._without(batch, {DUPLICATE: lambda rest, _: self._urls.add(rest["url"])})
            if batch.num_rows:
                yield batch

    def counts(self) -> dict[str, int]:
        """Rows dropped by reason, those that hit only, in the order of the rules."""
        return {name: self.dropped[name] for name in (*RULES, DUPLICATE) if self.dropped[name]}

    def _without(self, batch: pa.RecordBatch, rules: Mapping[str, Rule]) -> pa.RecordBatch:
        """The rows that none of the rules hits; the others are counted under the first that does. One copy for all rules together."""
        dropped: pa.BooleanArray | None = None
        for name, rule in rules.items():
            mask = rule(batch, self.config)
            if mask is None:
                continue
            self.dropped[name] += (mask if dropped is None else pc.and_not(mask, dropped)).true_count
            dropped = mask if dropped is None else pc.or_(dropped, mask)
        return batch if dropped is None or not dropped.true_count else batch.filter(pc.invert(dropped))


def normalised_label(label: str) -> str:
    """A safety label as it is compared and kept: ASCII upper case without space around it."""
    return label.strip().upper()


def _known(mask: pa.BooleanArray) -> pa.BooleanArray:
    return pc.fill_null(mask, False) if mask.null_count else mask


def _not_utf8(texts: pa.StringArray) -> pa.BooleanArray | None:
    octets = texts.cast(pa.binary())
    try:
        octets.cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array([value is not None and not _is_utf8(value) for value in octets.to_pylist()], pa.bool_())
    return None


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True
