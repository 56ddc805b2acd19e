"""Classifier-free guidance (arXiv 2207.12598) in its two conventions; guide_imagen(u, c, w + 1) = guide_lcm(c, u, w).

Any affine function of the model's output may be guided: eps, v, x0 or the score give the same result at one x_t.
"""

from torch import Tensor


def guide_imagen(unconditional: Tensor, conditional: Tensor, scale: float | Tensor) -> Tensor:
    """u + s (c - u): 1 is no guidance. Imagen (arXiv 2205.11487) eq. 2, diffusers' pipelines, SDXL-Lightning, DMD2."""
    return unconditional + scale * (conditional - unconditional)


def guide_lcm(conditional: Tensor, unconditional: Tensor, w: float | Tensor) -> Tensor:
    """c + w (c - u): 0 is no guidance. LCM (arXiv 2310.04378) eq. 14."""
    return conditional + w * (conditional - unconditional)
