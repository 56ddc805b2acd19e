"""What plain denoising training is made of, from scratch (`train-teacher`) or from a teacher (`finetune`): timesteps, and the weight of each."""

import torch
from torch import Tensor

from stages.training.randomness import Draw


def stratified_timesteps(draw: Draw, batch_size: int, train_timesteps: int) -> Tensor:
    """Timesteps (B,) long, uniform in 0..T-1, each sample's from its own stratum of the global batch, which lowers the variance of the loss."""
    strata = torch.tensor(list(draw.positions), device=draw.device)
    uniform = (strata + draw.uniform("timestep")) / batch_size
    return (uniform * train_timesteps).long().clamp(max=train_timesteps - 1)


def min_snr_weight(snr: Tensor, gamma: float | None, prediction: str) -> Tensor:
    """Min-SNR-gamma weight (B,) of the squared error of a prediction (arXiv 2303.09556, 3.4); ones without gamma."""
    if gamma is None:
        return torch.ones_like(snr)
    scale = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction]
    return snr.clamp(max=gamma) / scale
