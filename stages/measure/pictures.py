"""What is measured of each picture, once. Thresholds come later, so that changing one reads no picture again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import cv2
import pyarrow as pa

from stages.measure.looks import perceptual_hash, thumbnail
from stages.measure.sharpness import high_frequency, luma_of, sharpness
from stages.pictures import BrokenPictureError, decode_rgb
from stages.shards import Sample, read_samples

MEASUREMENTS: Final = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),  # as downloaded
        ("width", pa.int64()),  # of the decoded picture, upright; 0 where it cannot be decoded
        ("height", pa.int64()),
        ("aesthetic", pa.float64()),  # the table's score, or the predictor's; null where there is neither
        ("similarity", pa.float64()),  # of text and picture by CLIP, as the table has it
        ("watermark", pa.float64()),  # probability, as the table has it
        ("unsafe", pa.float64()),  # probability, as the table has it
        ("nsfw", pa.string()),  # label, as the table has it, in capitals
        ("sharpness", pa.float64()),  # `stages.measure.sharpness`; null where it cannot be decoded
        ("high_frequency", pa.float64()),
        ("sha256", pa.string()),  # of the file
        ("phash", pa.int64()),  # 64 bits of perceptual hash as a signed integer; null where it cannot be decoded
        ("animated", pa.bool_()),
        ("unreadable", pa.string()),  # why it cannot be decoded; null where it can
    ]
)
THUMBNAILS: Final = pa.schema([("key", pa.string()), ("thumbnail", pa.binary())])  # JPEG; null where it cannot be decoded
_COPIED: Final = ("url", "aesthetic", "similarity", "watermark", "unsafe", "nsfw", "sha256")


def measure_shard(shard: Path, analysis_px: int, thumbnail_px: int) -> tuple[pa.Table, pa.Table]:
    """Measure every picture of a shard, in order: tables of `MEASUREMENTS` and `THUMBNAILS`."""
    cv2.setNumThreads(1)  # the shards are worked on in parallel
    rows, small = zip(*(measure(sample, analysis_px, thumbnail_px) for sample in read_samples(shard)), strict=True)
    return pa.Table.from_pylist(list(rows), MEASUREMENTS), pa.Table.from_pylist(list(small), THUMBNAILS)


def measure(sample: Sample, analysis_px: int, thumbnail_px: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure one picture: a row of `MEASUREMENTS` and one of `THUMBNAILS`. One that cannot be decoded gets rows that say so."""
    known: Mapping[str, Any] = sample.row
    row = {"key": sample.key, "caption": sample.caption} | {name: known.get(name) for name in _COPIED}
    small: dict[str, Any] = {"key": sample.key, "thumbnail": None}
    try:
        picture, animated = decode_rgb(sample.image)
    except BrokenPictureError as error:
        nothing = dict.fromkeys(("sharpness", "high_frequency", "phash"))
        return row | nothing | {"width": 0, "height": 0, "animated": False, "unreadable": error.reason}, small
    luma = luma_of(picture)
    row |= {"width": picture.width, "height": picture.height, "animated": animated, "unreadable": None}
    row |= {"sharpness": sharpness(luma, analysis_px), "high_frequency": high_frequency(luma), "phash": perceptual_hash(picture)}
    return row, small | {"thumbnail": thumbnail(picture, thumbnail_px)}
