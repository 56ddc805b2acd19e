"""The losses of distribution matching as functions of tensors (DMD, arXiv 2311.18828). All in float32 or wider."""

import torch
from torch import Tensor


def matching_gradient(x: Tensor, x0_fake: Tensor, x0_real: Tensor) -> Tensor:
    """(mu_fake - mu_real) / mean_CHW |x - mu_real|: the direction in which x (B, C, h, w) leaves the teacher's distribution (DMD algorithm 2).

    With the scores s = -(x_t - alpha mu) / sigma^2 and the weight w_t = (sigma^2 / alpha) C S / norm1(mu_real - x) of eq. 8 it is
    w_t (s_fake - s_real). The factor alpha = dx_t / dx that eq. 7 has besides is left out by algorithm 2. The weight is each sample's own, from the
    real prediction. No gradient flows through the result.
    """
    with torch.no_grad():
        normaliser = (x - x0_real).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
        return (x0_fake - x0_real) / normaliser


def matching_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """0.5 mean (x - stopgrad(x - g))^2, whose gradient is g over the number of values (DMD algorithm 2)."""
    return 0.5 * (x - (x - gradient).detach()).square().mean()
