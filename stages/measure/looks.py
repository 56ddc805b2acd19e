"""What a picture looks like, in few bytes: a perceptual hash to find its copies by, a thumbnail to show, and what a predictor sees."""

import cv2
import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

_HASHED_PX = 256
_THUMBNAIL_QUALITY = 80


def perceptual_hash(luma: NDArray[np.uint8]) -> int:
    """The 64-bit DCT hash of the library imagehash (`phash`) of (H, W) luma, as a signed integer: copies differ in few bits, whatever their size."""
    bits = int(str(imagehash.phash(Image.fromarray(_thinned(luma, _HASHED_PX)))), 16)
    return bits - 2**64 if bits >= 2**63 else bits


def thumbnail(pixels: NDArray[np.uint8], short_side: int) -> bytes:
    """A JPEG of (H, W, 3 or 4) RGB pixels, its short side at most `short_side` pixels, its long side at most eight times that."""
    height, width = pixels.shape[:2]
    scale = min(1, short_side / min(height, width))
    size = tuple(max(1, min(round(side * scale), 8 * short_side)) for side in (width, height))
    small = cv2.resize(_thinned(pixels, 2 * short_side), size, interpolation=cv2.INTER_AREA)
    encoded = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _THUMBNAIL_QUALITY])[1]
    return encoded.tobytes()


def clip_pixels(picture: Image.Image, side: int) -> NDArray[np.uint8]:
    """The picture as CLIP was trained to see it: centre square, brought to `side` pixels by Pillow's bicubic filter; (side, side, 3)."""
    square = min(picture.size)
    left, top = (picture.width - square) / 2, (picture.height - square) / 2
    return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + square, top + square)))


def _thinned(pixels: NDArray[np.uint8], short_side: int) -> NDArray[np.uint8]:
    """Every n-th pixel both ways, leaving at least `short_side` on the short side, so that what follows touches few pixels."""
    height, width = pixels.shape[:2]
    step = min(height, width) // short_side
    if step <= 1:
        return pixels
    return np.asarray(cv2.resize(pixels, (width // step, height // step), interpolation=cv2.INTER_NEAREST), dtype=np.uint8)
