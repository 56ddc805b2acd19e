"""What is measured of each picture, once. Thresholds come later, so that changing one reads no picture again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import cv2
import pyarrow as pa

from stages.measure.sharpness import sharpness
from stages.pictures import BrokenPictureError, decode_rgb
from stages.shards import Sample, read_samples

MEASUREMENTS: Final = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("width", pa.int64()),  # of the decoded picture, upright; 0 where it cannot be decoded
        ("height", pa.int64()),
        ("aesthetic", pa.float64()),  # the table's score, or the predictor's; null where there is neither
        ("sharpness", pa.float64()),
        ("animated", pa.bool_()),
        ("unreadable", pa.string()),  # why it cannot be decoded; null where it can
    ]
)


def measure_shard(shard: Path, analysis_px: int) -> pa.Table:
    """Measure every picture of a shard, in order; a picture that cannot be decoded gets a row that says why."""
    cv2.setNumThreads(1)  # the shards are worked on in parallel
    return pa.Table.from_pylist([measure(sample, analysis_px) for sample in read_samples(shard)], MEASUREMENTS)


def measure(sample: Sample, analysis_px: int) -> dict[str, Any]:
    """Measure one picture: a row of `MEASUREMENTS`."""
    known: Mapping[str, Any] = sample.row
    row = {"key": sample.key, "url": known.get("url"), "caption": sample.caption, "aesthetic": known.get("aesthetic")}
    try:
        picture, animated = decode_rgb(sample.image)
    except BrokenPictureError as error:
        return row | {"width": 0, "height": 0, "sharpness": None, "animated": False, "unreadable": error.reason}
    measured = {"width": picture.width, "height": picture.height, "sharpness": sharpness(picture, analysis_px)}
    return row | measured | {"animated": animated, "unreadable": None}
