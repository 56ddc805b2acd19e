"""How sharp a picture is, as a number that depends neither on its size nor on its contrast."""

from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

_FLAT: Final = 1e-3
"""Luma variance (8-bit levels squared) below which a picture shows nothing: not even one level of rounding on one pixel in a thousand."""


def sharpness(luma: NDArray[np.float32], analysis_px: int) -> float:
    """Variance of the Laplacian over the variance of the luma, after shrinking the short side to `analysis_px` pixels (never enlarging).

    A unitless ratio of at most about 64, rounded to six digits: the mean square gain of the 4-neighbour Laplacian over the picture's spectrum.
    White noise gives 20, a checkerboard of pixels 64, photographs in focus some hundredths, the same blurred by 3 pixels thousandths. Flat
    pictures, and those less than 3 pixels high or wide, give 0. The bare variance of the Laplacian (Pech-Pacheco et al. 2000, "Diatom
    autofocusing in brightfield microscopy") moves with contrast and twentyfold with scale.
    """
    luma = shrink(luma, analysis_px)
    if min(luma.shape) < 3:
        return 0.0
    variance = float(luma.var(dtype=np.float64))
    if variance < _FLAT:
        return 0.0
    laplacian = cv2.Laplacian(luma, cv2.CV_32F, ksize=1)[1:-1, 1:-1]  # the border would see pixels that are not there
    return float(f"{float(laplacian.var(dtype=np.float64)) / variance:.6g}")


def shrink(luma: NDArray[np.float32], short_side: int) -> NDArray[np.float32]:
    """Shrink (H, W) by area averaging until the short side is `short_side` pixels; a smaller picture is returned as it is."""
    height, width = luma.shape
    scale = short_side / min(height, width)
    if scale >= 1:
        return luma
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(luma, size, interpolation=cv2.INTER_AREA), dtype=np.float32)


def luma_of(picture: Image.Image) -> NDArray[np.float32]:
    """Luma (H, W) of BT.601 in 8-bit levels."""
    # In floats: rounded to whole levels, a picture of low contrast would be all rounding noise, which is as sharp as noise can be.
    rgb = np.asarray(picture.convert("RGB"), dtype=np.float32)
    return np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), dtype=np.float32)


def high_frequency(luma: NDArray[np.float32]) -> float:
    """Share of the spectral energy (without the mean) above half of the Nyquist frequency along either axis, at native size."""
    height, width = luma.shape
    spectrum = np.abs(np.fft.rfft2(luma - luma.mean())) ** 2
    total = float(spectrum.sum())
    high = (np.abs(np.fft.fftfreq(height))[:, None] > 0.25) | (np.fft.rfftfreq(width)[None] > 0.25)
    return float(f"{float(spectrum[high].sum()) / total:.6g}") if total > height * width * _FLAT else 0.0
