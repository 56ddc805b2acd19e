"""How sharp a picture is: two numbers that do not depend on contrast, nor on how much of the picture is flat."""

from dataclasses import dataclass
from typing import Any, Final, Self

import cv2
import numpy as np
from numpy.typing import NDArray

TILE: Final = 64
"""Side of a tile (pixels): of the shrunk picture for `sharpness`, of the native one for `high_frequency`."""
DETAILED: Final = 16
"""`high_frequency` looks at this many tiles, where the picture has most detail."""
PERCENTILE: Final = 95
"""Of the tiles that show something: a sharp bird before a blurred sky is a sharp picture."""
_FLAT: Final = 144.0
"""Luma variance of a tile (8-bit levels squared) from which on it shows something: a standard deviation of 12 levels."""
_ROUNDING: Final = 1 / 12
"""Variance of the error that rounding to whole levels makes (levels squared)."""
_LAPLACIAN_GAIN: Final = 20.0
"""Variance of the 4-neighbour Laplacian of white noise of variance 1: 1 + 1 + 1 + 1 + 16."""
_NOISE_PERCENTILE: Final = 10
_MOST_NOISE: Final = 25.0
"""Variance (levels squared) up to which noise is taken off; what is more is texture."""

Luma = NDArray[np.uint8]
"""(H, W) in 8-bit levels."""


def shrink(luma: Luma, short_side: int) -> Luma:
    """Shrink until the short side is `short_side` pixels; a smaller picture is returned as it is.

    By averaging n x n pixels, n the whole part of the scale, and bilinear interpolation for the rest, which is below 2.
    """
    height, width = luma.shape
    scale = min(height, width) / short_side
    if scale <= 1:
        return luma
    size = (max(1, round(width / scale)), max(1, round(height / scale)))
    whole = int(scale)
    while whole > 1:
        step = 2 if whole % 2 == 0 else whole  # OpenCV halves many times faster than it does anything else
        averaged = (luma.shape[1] // step, luma.shape[0] // step)
        covered = luma[: averaged[1] * step, : averaged[0] * step]
        luma = np.asarray(cv2.resize(covered, averaged, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        whole //= step
    return np.asarray(cv2.resize(luma, size, interpolation=cv2.INTER_LINEAR), dtype=np.uint8)


@dataclass(frozen=True)
class Tiles:
    """What a shrunk picture shows, tile by tile: (rows, columns) each, no tile for a picture less than 3 pixels high or wide."""

    detail: NDArray[np.float64]
    """Variance of the 4-neighbour Laplacian."""
    variance: NDArray[np.float64]
    """Variance of the luma."""

    @classmethod
    def of(cls, luma: Luma) -> Self:
        """Cut `luma` into whole tiles of `TILE` pixels, or of the whole side where that is shorter."""
        if min(luma.shape) < 3:
            return cls(np.zeros((0, 0)), np.zeros((0, 0)))
        # Without the border, whose Laplacian would see pixels that are not there.
        return cls(_variances(cv2.Laplacian(luma, cv2.CV_16S)[1:-1, 1:-1]), _variances(luma[1:-1, 1:-1]))

    @property
    def shown(self) -> NDArray[np.bool_]:
        """Which tiles are not flat."""
        found: NDArray[np.bool_] = self.variance >= _FLAT
        return found


def sharpness(tiles: Tiles) -> float:
    """Variance of the Laplacian over variance of the luma, tile by tile; the 95th percentile of the tiles that are not flat.

    `tiles` are those of the picture after `shrink`, so that the number speaks of the picture as it is trained on. A unitless ratio of at most 64,
    rounded to six digits: the mean square gain of the 4-neighbour Laplacian over a tile's spectrum. White noise gives 20, a checkerboard 64,
    photographs in focus some tenths, the same blurred by 3 pixels some thousandths. Tiles count where their luma varies by 12 levels: the noise of
    a flat sky has any ratio. Noise is everywhere in a picture and detail is not, so the Laplacian's variance in the smoothest tenth of all tiles is
    taken off, at least what rounding to whole levels makes and at most what noise of 5 levels does. 0 where every tile is flat. The bare variance
    of the Laplacian (Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy") moves with contrast and twentyfold with scale.
    """
    shown = tiles.shown
    if not shown.any():
        return 0.0
    noise = np.clip(np.percentile(tiles.detail, _NOISE_PERCENTILE), _LAPLACIAN_GAIN * _ROUNDING, _LAPLACIAN_GAIN * _MOST_NOISE)
    return _rounded(np.percentile(np.maximum(tiles.detail[shown] - noise, 0) / tiles.variance[shown], PERCENTILE))


def high_frequency(luma: Luma, tiles: Tiles) -> float:
    """Share of the spectral energy above half of the Nyquist frequency, at native size: near 0 for a picture enlarged twice or more.

    `luma` is the picture as it is, `tiles` those of the shrunk one. Looked at are the `DETAILED` places whose tiles have the greatest variance of the
    Laplacian, flat ones left out; at the middle of each, `TILE` x `TILE` native pixels are cut out. Their energy is the power spectrum under a Hann
    window, the windowed mean taken off before; above half of Nyquist means more than 1/4 cycle per pixel along either axis: just what no
    enlargement by 2 can fill. What rounding to whole levels adds is taken off, and the 75th percentile of their shares is returned: unitless in 0..1,
    rounded to six digits. White noise gives 0.75. 0 where every tile is flat or the picture is smaller than a tile.
    """
    height, width = luma.shape
    places = np.flatnonzero(tiles.shown)
    if min(height, width) < TILE or not len(places):
        return 0.0
    chosen = places[np.argsort(-tiles.detail.ravel()[places], kind="stable")[:DETAILED]]
    rows, columns = tiles.detail.shape
    tops = (chosen // columns + 0.5) / rows * height - TILE / 2
    lefts = (chosen % columns + 0.5) / columns * width - TILE / 2
    corners = zip(np.clip(tops, 0, height - TILE).astype(int).tolist(), np.clip(lefts, 0, width - TILE).astype(int).tolist(), strict=True)
    # float64, so that machines agree to far more than six digits.
    cut = np.stack([luma[top : top + TILE, left : left + TILE] for top, left in corners]).astype(np.float64)
    cut -= np.einsum("nij,i,j->n", cut, _HANN, _HANN)[:, None, None] / _HANN.sum() ** 2
    cut *= _HANN[:, None] * _HANN
    spectrum = np.fft.rfft2(cut)
    power = spectrum.real**2 + spectrum.imag**2
    power[:, :, 1:-1] *= 2  # the half of the spectrum that a real picture's mirrors
    total, high = power.sum(axis=(1, 2)), power[:, _HIGH].sum(axis=1)
    rounding = _ROUNDING * (_HANN**2).sum() ** 2 * _HIGH_SHARE * TILE**2
    share = np.divide(np.maximum(high - rounding, 0), total, out=np.zeros_like(total), where=total > 0)
    return _rounded(np.percentile(share, _SHARE_PERCENTILE))


_SHARE_PERCENTILE: Final = 75
_HANN: Final = np.hanning(TILE + 1)[:TILE]
_HIGH: Final = np.maximum(np.abs(np.fft.fftfreq(TILE))[:, None], np.fft.rfftfreq(TILE)[None]) > 0.25
_HIGH_SHARE: Final = float((np.maximum(*np.abs(np.meshgrid(np.fft.fftfreq(TILE), np.fft.fftfreq(TILE)))) > 0.25).mean())


def _variances(values: NDArray[Any]) -> NDArray[np.float64]:
    """Variances of the whole tiles of (H, W) values, from exact sums."""
    height, width = (min(TILE, side) for side in values.shape)
    rows, columns = values.shape[0] // height, values.shape[1] // width
    bands = values[: rows * height, : columns * width].astype(np.int32).reshape(rows, height, columns * width)
    sums = bands.sum(axis=1, dtype=np.int32)  # along whole rows, which is fast, before the few columns
    squares = np.square(bands, out=bands).sum(axis=1, dtype=np.int32)
    mean, square = (part.reshape(rows, columns, width).sum(axis=2, dtype=np.int64) / (height * width) for part in (sums, squares))
    variances: NDArray[np.float64] = square - mean**2
    return variances


def _rounded(value: np.floating) -> float:
    return float(f"{float(value):.6g}")
