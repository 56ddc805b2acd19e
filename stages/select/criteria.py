"""Which pictures pass. Each criterion is a function from measurements to a mask; the first that a picture fails names its verdict."""

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.data import CaptionConfig, SelectConfig
from stages.select.captions import DROPPING
from stages.select.tables import column

Criterion = Callable[[pa.Table, SelectConfig], pa.ChunkedArray | pa.Array]
"""True where the picture fails; null counts as not failing."""
Codes = NDArray[np.uint8]
"""Verdicts: 0 is passed, n is the n-th of `REASONS`, from 1 on."""


def unreadable(rows: pa.Table, _config: SelectConfig) -> pa.ChunkedArray:
    """Its bytes do not decode."""
    return pc.is_valid(rows["unreadable"])


def animated(rows: pa.Table, _config: SelectConfig) -> pa.ChunkedArray:
    """More than one frame."""
    return rows["animated"]


def resolution(rows: pa.Table, config: SelectConfig) -> pa.ChunkedArray:
    """The short side of the decoded picture is not strictly above `min_side_px`."""
    return pc.less_equal(pc.min_element_wise(rows["width"], rows["height"]), config.min_side_px)


def no_score(rows: pa.Table, config: SelectConfig) -> pa.ChunkedArray:
    """An aesthetic score is asked for, and neither the table nor a predictor gave one."""
    return pc.and_(pc.is_null(rows["aesthetic"], nan_is_null=True), config.min_aesthetic is not None)


def aesthetic(rows: pa.Table, config: SelectConfig) -> pa.ChunkedArray:
    """The score is not strictly above `min_aesthetic`."""
    return pc.less_equal(rows["aesthetic"], -np.inf if config.min_aesthetic is None else config.min_aesthetic)


def blurred(rows: pa.Table, config: SelectConfig) -> pa.ChunkedArray:
    """The sharpness is below `min_sharpness`."""
    return pc.less(rows["sharpness"], config.min_sharpness)


def upscaled(rows: pa.Table, config: SelectConfig) -> pa.ChunkedArray:
    """The share of high frequencies is below `min_high_frequency`: there is no detail of the size of a pixel."""
    return pc.less(rows["high_frequency"], config.min_high_frequency)


def watermark(rows: pa.Table, config: SelectConfig) -> pa.ChunkedArray:
    """The table's watermark probability is not strictly below `max_watermark`; where it has none, the picture passes."""
    return _not_below(rows["watermark"], config.max_watermark)


def unsafe(rows: pa.Table, config: SelectConfig) -> pa.ChunkedArray:
    """The table's unsafe probability is not strictly below `max_unsafe`; where it has none, the picture passes."""
    return _not_below(rows["unsafe"], config.max_unsafe)


def nsfw(rows: pa.Table, config: SelectConfig) -> pa.ChunkedArray:
    """The table's NSFW label is one of `drop_nsfw`; where it has none, the picture passes."""
    return pc.is_in(rows["nsfw"], value_set=pa.array(config.drop_nsfw, pa.string()))


def similarity(rows: pa.Table, config: SelectConfig) -> pa.ChunkedArray:
    """The table's similarity of picture and caption is below `min_similarity`; where it has none, the picture passes."""
    return pc.less(rows["similarity"], -np.inf if config.min_similarity is None else config.min_similarity)


def _not_below(values: pa.ChunkedArray, bound: float | None) -> pa.ChunkedArray:
    return pc.greater_equal(values, np.inf if bound is None else bound)


def _of_caption(name: str, drop: Callable[[pa.Array, CaptionConfig], pa.Array]) -> Criterion:
    def criterion(rows: pa.Table, config: SelectConfig) -> pa.Array:
        wanted = getattr(config.captions.rules, name)
        return drop(column(rows, "caption"), config.captions) if wanted else pa.array(np.zeros(rows.num_rows, bool))

    return criterion


CRITERIA: Final[Mapping[str, Criterion]] = {
    "unreadable": unreadable,
    "animated": animated,
    "resolution": resolution,
    "no aesthetic score": no_score,
    "aesthetic": aesthetic,
    "sharpness": blurred,
    "upscaled": upscaled,
    "watermark": watermark,
    "unsafe": unsafe,
    "nsfw": nsfw,
    "similarity": similarity,
} | {f"caption {name.replace('_', ' ')}": _of_caption(name, drop) for name, drop in DROPPING.items()}
"""What a picture is judged by alone, in this order."""

SAME_FILE: Final = "duplicate"
SAME_PICTURE: Final = "near duplicate"
REASONS: Final = (*CRITERIA, SAME_FILE, SAME_PICTURE)
"""Why pictures are dropped. The last two are looked for among those that pass all else."""


def judge(rows: pa.Table, config: SelectConfig) -> Codes:
    """Return the verdicts (N,) of rows whose captions are cleaned, each by itself: 0 where no criterion is failed."""
    codes = np.zeros(rows.num_rows, np.uint8)
    for code, criterion in enumerate(CRITERIA.values(), 1):
        failed = np.asarray(pc.fill_null(criterion(rows, config), False))
        codes[failed & (codes == 0)] = code
    return codes


def with_verdicts(rows: pa.Table, codes: Codes) -> pa.Table:
    """Return the rows with `passed`, and `reason`, which is null where passed."""
    reasons = pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32) - 1, mask=codes == 0), pa.array(REASONS)).cast(pa.string())
    return rows.append_column("passed", pa.array(codes == 0)).append_column("reason", reasons)


def counts(codes: Codes) -> dict[str, int]:
    """Pictures dropped, by reason, in the order of the reasons, those that hit only."""
    found = np.bincount(codes, minlength=len(REASONS) + 1)[1:]
    return {name: int(count) for name, count in zip(REASONS, found, strict=True) if count}
