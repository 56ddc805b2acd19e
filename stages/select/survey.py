"""What the report shows of every criterion with a threshold: how its values lie, and the pictures nearest to the threshold on either side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.data import SelectConfig
from stages.select.criteria import REASONS, Codes
from stages.select.tables import Batch, column, numbers

Values = NDArray[np.float64]
SAMPLED_SHARDS: Final = 16
"""Shards, evenly spread, whose pictures are shown: thumbnails of the others are not fetched."""
NEAREST: Final = 6
"""Pictures shown on each side of a threshold."""


@dataclass(frozen=True)
class Axis:
    """One number that pictures are judged by."""

    title: str
    values: Callable[[pa.Table], Values]
    """NaN where a picture has none."""
    threshold: str
    """Field of `SelectConfig`."""
    says: str
    """Which side passes, in words, before the threshold."""
    edges: Values
    """Of the histogram's bins, ascending; values beyond count in the outermost."""
    log: bool = False
    low_passes: bool = False
    unit: str = ""
    pictures: bool = True
    """False: nobody wants to be shown these."""


def _short_side(rows: pa.Table) -> Values:
    sides = np.minimum(numbers(rows, "width"), numbers(rows, "height"))
    return np.where(sides > 0, sides, np.nan)


def _characters(rows: pa.Table) -> Values:
    return np.asarray(pc.utf8_length(column(rows, "caption")).to_numpy(), np.float64)


def _of(name: str) -> Callable[[pa.Table], Values]:
    return lambda rows: numbers(rows, name)


AXES: Final[Mapping[str, Axis]] = {
    "resolution": Axis("Resolution", _short_side, "min_side_px", "short side above", np.geomspace(64, 16384, 65), log=True, unit="px"),
    "aesthetic": Axis("Aesthetic score", _of("aesthetic"), "min_aesthetic", "above", np.linspace(0, 10, 81)),
    "sharpness": Axis("Sharpness", _of("sharpness"), "min_sharpness", "at least", np.geomspace(1e-5, 100, 71), log=True),
    "upscaled": Axis("High frequencies", _of("high_frequency"), "min_high_frequency", "share at least", np.geomspace(1e-8, 1, 65), log=True),
    "watermark": Axis("Watermark", _of("watermark"), "max_watermark", "probability below", np.linspace(0, 1, 51), low_passes=True),
    "unsafe": Axis("Unsafe", _of("unsafe"), "max_unsafe", "probability below", np.linspace(0, 1, 51), low_passes=True, pictures=False),
    "similarity": Axis("Similarity of caption", _of("similarity"), "min_similarity", "at least", np.linspace(-0.2, 0.8, 51)),
    "caption too short": Axis(
        "Length of caption", _characters, "captions.min_characters", "at least", np.geomspace(1, 1000, 46), log=True, unit="characters",
        pictures=False,
    ),
}  # fmt: skip
"""By the reason for which pictures are dropped."""


@dataclass(frozen=True, order=True)
class Shown:
    """A picture to show."""

    distance: float
    """From the threshold."""
    row: int
    """Position among all rows."""
    shard: int = field(compare=False)
    place: int = field(compare=False)
    """Position in its shard."""
    key: str = field(compare=False)
    value: float = field(compare=False)


@dataclass
class Tally:
    """What one criterion has seen so far."""

    counts: NDArray[np.int64]
    measured: int = 0
    """Pictures that have a value."""
    fails: int = 0
    """Of those, on the wrong side, whatever else is wrong with them."""
    passing: tuple[Shown, ...] = ()
    """Nearest first: pictures that came as far as this criterion and passed it."""
    failing: tuple[Shown, ...] = ()
    """Pictures whose verdict is this criterion."""


class Survey:
    """Gathers, batch by batch, in memory that does not depend on the number of rows."""

    def __init__(self, config: SelectConfig, shards: int) -> None:
        self.thresholds = {reason: threshold_of(axis, config) for reason, axis in AXES.items()}
        self.tallies = {reason: Tally(np.zeros(len(axis.edges) - 1, np.int64)) for reason, axis in AXES.items()}
        self.sampled = sampled_shards(shards)

    def add(self, batch: Batch, codes: Codes) -> None:
        """Add a batch with its verdicts."""
        sampled = np.isin(batch.shard, self.sampled)
        for reason, tally in self.tallies.items():
            axis, threshold, code = AXES[reason], self.thresholds[reason], REASONS.index(reason) + 1
            values = axis.values(batch.rows)
            known = np.isfinite(values)
            tally.measured += int(known.sum())
            tally.counts += np.histogram(np.clip(values[known], axis.edges[0], axis.edges[-1]), axis.edges)[0]
            if threshold is not None:
                tally.fails += int(wrong_side(axis, values[known], threshold).sum())
            if threshold is not None and axis.pictures:
                came = known & sampled & ((codes == 0) | (codes >= code))
                distance = np.abs(values - threshold)
                tally.failing = _nearest(tally.failing, batch, values, distance, came & (codes == code))
                tally.passing = _nearest(tally.passing, batch, values, distance, came & (codes != code))


def sampled_shards(shards: int) -> Sequence[int]:
    """Numbers of the shards whose pictures are shown."""
    return sorted({number * shards // SAMPLED_SHARDS for number in range(SAMPLED_SHARDS)}) if shards > SAMPLED_SHARDS else range(shards)


def threshold_of(axis: Axis, config: SelectConfig) -> float | None:
    """The criterion's threshold, or None where it is not looked at: null, or a lower bound of 0 for what is never below."""
    value: float | None = attrgetter(axis.threshold)(config)
    return None if value is None or (value == 0 and axis.log) else float(value)


def wrong_side(axis: Axis, values: Values, threshold: float) -> NDArray[np.bool_]:
    """Which values fail."""
    if axis.low_passes:
        return values >= threshold
    return values < threshold if axis.says.endswith("at least") else values <= threshold


def _nearest(best: tuple[Shown, ...], batch: Batch, values: Values, distance: Values, wanted: NDArray[np.bool_]) -> tuple[Shown, ...]:
    found = np.flatnonzero(wanted)
    near = found[np.argsort(distance[found], kind="stable")[:NEAREST]]
    keys = column(batch.rows, "key").take(pa.array(near)).to_pylist()
    new = [
        Shown(float(distance[i]), batch.first + int(i), int(batch.shard[i]), int(batch.place[i]), key, float(values[i]))
        for i, key in zip(near, keys, strict=True)
    ]
    return tuple(sorted([*best, *new])[:NEAREST])
