"""Pictures from the open web: whole, bounded decoding to upright RGB. Whatever is wrong with the bytes becomes one named reason."""

import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

MAX_PIXELS: Final = 128_000_000
"""Larger pictures are refused before a pixel is decoded: a few kilobytes can claim gigabytes."""

_EXTENSIONS: Final = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_OPENED: Final = ("JPEG", "PNG", "WEBP")
_LUMA_APART: Final = ("JPEG", "MPO")
_ORIENTATION_TAG: Final = 0x0112
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES: Final = frozenset({5, 6, 7, 8})
_HOSTILE_BYTES: Final = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, BufferError, EOFError,
    MemoryError, NotImplementedError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's decoders raise on malformed files."""

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS is the bound here, and it refuses
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # malformed files are counted, not told one by one


class BrokenPictureError(Exception):
    """The bytes are no picture that can be used. `reason` is one of a small fixed set, fit for counting."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class PictureFacts:
    """What a picture is, told from its bytes alone."""

    extension: str
    """`jpg`, `png` or `webp`, by content."""
    width: int
    """Pixels, upright (the orientation tag applied)."""
    height: int
    animated: bool
    sha256: str
    """Of the file's bytes."""


def inspect_picture(data: bytes) -> PictureFacts:
    """Decode every pixel and return the facts. Raises `BrokenPictureError`."""
    with _decoding():
        image = _open(data)
        width, height = image.size
        animated = _is_animated(image)
        orientation = _orientation(image)
        image.load()
    width, height = upright_size((width, height), orientation)
    return PictureFacts(_EXTENSIONS[str(image.format)], width, height, animated, hashlib.sha256(data).hexdigest())


def decode_rgb(data: bytes) -> tuple[Image.Image, bool]:
    """Return the upright RGB picture (its first frame; transparency over white; 16 bits brought to 8) and whether it is animated.

    Raises `BrokenPictureError`.
    """
    with _decoding():
        image = _open(data)
        animated = _is_animated(image)
        orientation = _orientation(image)
        image.load()
        return upright(_to_rgb(image), orientation), animated


def decode_luma(data: bytes) -> tuple[NDArray[np.uint8], int, bool]:
    """Return the luma (H, W) as it is stored, not upright; its orientation, for `upright`; and whether the picture is animated.

    Of a JPEG only the luma is decoded, which takes two thirds of the time; of anything else it is that of `decode_rgb`. Not to be written to. Raises
    `BrokenPictureError`.
    """
    with _decoding():
        image = _open(data)
        animated = _is_animated(image)
        orientation = _orientation(image)
        if image.format in _LUMA_APART:
            image.draft("L", image.size)
        image.load()
        return pixels_of(image if image.mode == "L" else _to_rgb(image).convert("L")), orientation, animated


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Turn or mirror a picture by its orientation tag."""
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Width and height after `upright`."""
    return (size[1], size[0]) if orientation in _SWAPS_SIDES else size


def pixels_of(grey: Image.Image) -> NDArray[np.uint8]:
    """The pixels (H, W) of a picture of mode L, not to be written to: not copied where Pillow can lend them."""
    try:
        lent: NDArray[np.uint8] = pa.array(grey).to_numpy()
    except ValueError:  # the picture lies in several blocks
        return np.asarray(grey)
    return lent.reshape(grey.height, grey.width)


def use_whole_blocks() -> None:
    """Let Pillow make every picture from now on in one block, so that `pixels_of` need not copy a large one."""
    Image.core.set_use_block_allocator(1)  # type: ignore[attr-defined]  # documented, but not declared


@contextmanager
def _decoding() -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError as error:
        raise BrokenPictureError("not an image") from error
    except _HOSTILE_BYTES as error:
        raise BrokenPictureError("broken image") from error


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=_OPENED)
    except UnidentifiedImageError:
        if _is_known_format(data):
            raise BrokenPictureError("unsupported format") from None
        raise
    except Image.DecompressionBombError as error:
        raise BrokenPictureError("too many pixels") from error
    if image.width * image.height > MAX_PIXELS:
        raise BrokenPictureError("too many pixels")
    return image


def _is_known_format(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)):
            return True
    except _HOSTILE_BYTES:
        return False


def _is_animated(image: Image.Image) -> bool:
    # An MPO is a photograph with further views or a preview behind it, not a film.
    return image.format != "MPO" and int(getattr(image, "n_frames", 1)) > 1


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _HOSTILE_BYTES:  # a broken tag block does not make the picture unusable
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # not copied
