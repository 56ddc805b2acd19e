"""The square training crop of an upright picture, shrunk to the resolution and never enlarged, and the numbers SDXL is conditioned on."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Crop:
    """Where a square crop lies: the picture is shrunk until its short side is the target, then cut at (`top`, `left`)."""

    original_width: int
    """Pixels of the upright picture before shrinking."""
    original_height: int
    top: int
    """Pixels in the shrunk picture."""
    left: int
    side: int
    """Pixels on a side of the result."""

    @property
    def original_hw(self) -> tuple[int, int]:
        """(height, width)."""
        return self.original_height, self.original_width


def centre_crop(width: int, height: int, side: int) -> Crop:
    """Plan the centre crop of a (width, height) picture to (side, side) pixels. Raises `ValueError` when that would enlarge it."""
    room_x, room_y = _room(width, height, side)
    return Crop(width, height, room_y // 2, room_x // 2, side)


def random_crop(width: int, height: int, side: int, seed: int, key: str) -> Crop:
    """Plan a crop at a uniform position that is a function of (seed, key), as SDXL was trained (arXiv 2307.01952, 2.2).

    Raises `ValueError` when that would enlarge the picture.
    """
    room_x, room_y = _room(width, height, side)
    drawn = int.from_bytes(hashlib.sha256(f"crop {seed}:{key}".encode()).digest()[:8])
    position = drawn % (max(room_x, room_y) + 1)  # one of the two is 0: the short side leaves no room
    return Crop(width, height, min(position, room_y), min(position, room_x), side)


def _room(width: int, height: int, side: int) -> tuple[int, int]:
    """Pixels that the shrunk picture is wider and higher than its crop."""
    short = min(width, height)
    if short < side:
        raise ValueError(f"a picture of {width} x {height} pixels cannot be shrunk to {side} x {side}")
    shrunk_width, shrunk_height = (max(side, round(length * side / short)) for length in (width, height))
    return shrunk_width - side, shrunk_height - side


def crop_pixels(picture: Image.Image, crop: Crop) -> Tensor:
    """Cut and shrink (Lanczos) an RGB picture: (3, side, side) float32 in -1..1. The region read is exactly the one that `crop` names."""
    scale = min(picture.size) / crop.side
    left, top = crop.left * scale, crop.top * scale
    edge = crop.side * scale
    box = (left, top, min(left + edge, picture.width), min(top + edge, picture.height))
    shrunk = picture.resize((crop.side, crop.side), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(shrunk)).permute(2, 0, 1).float() / 127.5 - 1.0
