"""What a picture looks like, in few bytes: a perceptual hash to find its copies by, a thumbnail to show, and what a predictor sees."""

import io
from typing import Final

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

SMALL_PX: Final = 256
"""Short side of the small picture that hash and thumbnail are made of."""
_QUALITY: Final = 80


def perceptual_hash(small: Image.Image) -> int:
    """The 64-bit DCT hash of the library imagehash (`phash`), as a signed integer: copies differ in few bits, whatever their size."""
    bits = int(str(imagehash.phash(small)), 16)
    return bits - 2**64 if bits >= 2**63 else bits


def thumbnail(small: Image.Image, short_side: int) -> bytes:
    """A JPEG of the picture, its short side at most `short_side` pixels, its long side at most eight times that."""
    scale = min(1, short_side / min(small.size))
    width, height = (max(1, min(round(side * scale), 8 * short_side)) for side in small.size)
    buffer = io.BytesIO()
    small.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def clip_pixels(picture: Image.Image, side: int) -> NDArray[np.uint8]:
    """The picture as CLIP was trained to see it: its centre square, brought to `side` pixels by Pillow's bicubic filter; (side, side, 3)."""
    square = min(picture.size)
    left, top = (picture.width - square) / 2, (picture.height - square) / 2
    return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + square, top + square)))
