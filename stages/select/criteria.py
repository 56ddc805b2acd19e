"""Which pictures pass. Each criterion is a function from measurements to a mask; the first that a picture fails names its verdict."""

from collections.abc import Callable
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from schemas.data import SelectConfig

Criterion = Callable[[pa.Table, SelectConfig], pa.ChunkedArray]
"""True where the picture fails."""


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
    return pc.less_equal(rows["aesthetic"], config.min_aesthetic if config.min_aesthetic is not None else float("-inf"))


def blurred(rows: pa.Table, config: SelectConfig) -> pa.ChunkedArray:
    """The sharpness is below `min_sharpness`."""
    return pc.less(rows["sharpness"], config.min_sharpness)


CRITERIA: Final[dict[str, Criterion]] = {
    "unreadable": unreadable,
    "animated": animated,
    "resolution": resolution,
    "no aesthetic score": no_score,
    "aesthetic": aesthetic,
    "sharpness": blurred,
}


def verdicts(rows: pa.Table, config: SelectConfig) -> pa.Table:
    """Return the measurements with `passed` and `reason` (the first criterion failed; null where passed)."""
    failed = [pc.fill_null(criterion(rows, config), False) for criterion in CRITERIA.values()]
    reason = pc.case_when(pc.make_struct(*failed), *CRITERIA)
    if not isinstance(reason, pa.ChunkedArray):
        reason = pa.chunked_array([reason])
    reason = reason.cast(pa.string())
    return rows.append_column("passed", pc.is_null(reason)).append_column("reason", reason)


def counts(judged: pa.Table) -> dict[str, int]:
    """Pictures dropped, by reason, in the order of the criteria, those that hit only."""
    found = {entry["values"]: entry["counts"] for entry in pc.value_counts(judged["reason"]).to_pylist()}
    return {name: found[name] for name in CRITERIA if name in found}
