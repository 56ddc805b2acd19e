"""The square training crop: centre of the upright picture, shrunk to the resolution, and the numbers SDXL is conditioned on."""

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
    short = min(width, height)
    if short < side:
        raise ValueError(f"a picture of {width} x {height} pixels cannot be shrunk to {side} x {side}")
    shrunk_width, shrunk_height = (max(side, round(length * side / short)) for length in (width, height))
    return Crop(width, height, (shrunk_height - side) // 2, (shrunk_width - side) // 2, side)


def crop_pixels(picture: Image.Image, crop: Crop) -> Tensor:
    """Cut and shrink (Lanczos) an RGB picture: (3, side, side) float32 in -1..1. The region read is exactly the one that `crop` names."""
    scale = min(picture.size) / crop.side
    left, top = crop.left * scale, crop.top * scale
    edge = crop.side * scale
    box = (left, top, min(left + edge, picture.width), min(top + edge, picture.height))
    shrunk = picture.resize((crop.side, crop.side), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(shrunk)).permute(2, 0, 1).float() / 127.5 - 1.0
