"""What a picture looks like, in few bytes: a perceptual hash to find its copies by, and a thumbnail to show."""

import io

import imagehash
from PIL import Image


def perceptual_hash(picture: Image.Image) -> int:
    """The 64-bit DCT hash of the library imagehash (`phash`), as a signed integer: copies differ in few bits, whatever their size."""
    bits = int(str(imagehash.phash(picture)), 16)
    return bits - 2**64 if bits >= 2**63 else bits


def thumbnail(picture: Image.Image, short_side: int) -> bytes:
    """A JPEG of the picture, its short side at most `short_side` pixels."""
    scale = short_side / min(picture.size)
    small = picture if scale >= 1 else picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
