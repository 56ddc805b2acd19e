"""What is measured of each picture, once. Thresholds come later, so that changing one reads no picture again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from stages.measure.looks import SMALL_PX, clip_pixels, perceptual_hash, thumbnail
from stages.measure.sharpness import Tiles, high_frequency, sharpness, shrink
from stages.pictures import BrokenPictureError, decode_luma, decode_rgb, upright, upright_size, use_whole_blocks
from stages.shards import Place, Sample

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
THUMBNAILS: Final = pa.schema([("key", pa.string()), ("thumbnail", pa.binary())])  # JPEG, in luma; null where it cannot be decoded
_COPIED: Final = ("url", "aesthetic", "similarity", "watermark", "unsafe", "nsfw", "sha256")


@dataclass(frozen=True)
class Slice:
    """Neighbouring pictures of a shard: what one process works on at a time."""

    shard: int
    places: Sequence[Place]
    last: bool
    """Whether the shard ends with it."""


@dataclass(frozen=True)
class Measured:
    """What a slice came to, in the order of its pictures."""

    rows: pa.Table
    """`MEASUREMENTS`."""
    thumbnails: pa.Table
    """`THUMBNAILS`."""
    to_score: Mapping[int, NDArray[np.uint8]]
    """By row: pictures without an aesthetic score as (S, S, 3) pixels for the predictor; empty where there is none."""


def measure_slice(part: Slice, analysis_px: int, thumbnail_px: int, predictor_px: int | None) -> Measured:
    """Measure every picture of a slice. `predictor_px` is the side of the pictures an aesthetic predictor sees, None where there is none."""
    cv2.setNumThreads(1)  # slices are worked on in parallel
    use_whole_blocks()
    measure = Measure(analysis_px, thumbnail_px, predictor_px)
    found = [measure(place.read()) for place in part.places]
    return Measured(
        pa.Table.from_pylist([one.row for one in found], MEASUREMENTS),
        pa.Table.from_pylist([{"key": one.row["key"], "thumbnail": one.thumbnail} for one in found], THUMBNAILS),
        {number: one.to_score for number, one in enumerate(found) if one.to_score is not None},
    )


@dataclass(frozen=True)
class Picture:
    """What one picture came to."""

    row: Mapping[str, Any]
    """Of `MEASUREMENTS`."""
    thumbnail: bytes | None = None
    to_score: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Measure:
    """Measures pictures one by one, each decoded once; those that a predictor must see in colour, twice."""

    analysis_px: int
    thumbnail_px: int
    predictor_px: int | None = None

    def __call__(self, sample: Sample) -> Picture:
        """Measure a picture. One that cannot be decoded gets a row that says why."""
        known: Mapping[str, Any] = sample.row
        row = {"key": sample.key, "caption": sample.caption} | {name: known.get(name) for name in _COPIED}
        try:
            luma, orientation, animated = decode_luma(sample.image)
            wanted = self.predictor_px is not None and row["aesthetic"] is None
            to_score = clip_pixels(decode_rgb(sample.image)[0], self.predictor_px or 0) if wanted else None
        except BrokenPictureError as error:
            nothing = dict.fromkeys(("sharpness", "high_frequency", "phash"))
            return Picture(row | nothing | {"width": 0, "height": 0, "animated": False, "unreadable": error.reason})
        width, height = upright_size((luma.shape[1], luma.shape[0]), orientation)
        shrunk = shrink(luma, self.analysis_px)
        tiles = Tiles.of(shrunk)
        small = upright(Image.fromarray(shrink(shrunk if self.analysis_px >= SMALL_PX else luma, SMALL_PX)), orientation)
        row |= {"width": width, "height": height, "animated": animated, "unreadable": None}
        row |= {"sharpness": sharpness(tiles), "high_frequency": high_frequency(luma, tiles), "phash": perceptual_hash(small)}
        return Picture(row, thumbnail(small, self.thumbnail_px), to_score)
