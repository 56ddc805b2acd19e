"""A denoiser whose answer is known in closed form: the exact score of a Gaussian mixture. A teacher for tests, and a check on any solver."""

import math

import torch
from torch import Tensor

from stages.diffusion.conditioning import Conditioning
from stages.diffusion.prediction import PREDICTION_TYPES, PredictionType
from stages.diffusion.schedule import NoiseSchedule


class GaussianMixtureDenoiser:
    """Exact denoiser of data p(x0) = sum_k w_k N(mean_k, std^2 I).

    At noise level t the data is sum_k w_k N(alpha mean_k, v I) with v = alpha^2 std^2 + sigma^2, so E[x0 | x_t] is a mean over components of
    mean_k + alpha std^2 / v (x_t - alpha mean_k), weighted by their responsibilities.
    """

    def __init__(
        self,
        means: Tensor,
        std: float,
        weights: Tensor | None = None,
        *,
        schedule: NoiseSchedule,
        prediction: PredictionType = PREDICTION_TYPES["epsilon"],
        by_class: bool = False,
    ) -> None:
        """`means` (K, C, h, w); `weights` (K,) sum to 1, None: equal. `by_class`: see `__call__`."""
        self.means = means
        self.std = std
        self.weights = weights if weights is not None else torch.full((len(means),), 1 / len(means))
        self.schedule = schedule
        self.prediction = prediction
        self.by_class = by_class

    def __call__(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning | None = None) -> Tensor:
        """Output (B, C, h, w) at x_t and timesteps (B,).

        With `by_class` the first value of each prompt embedding, rounded, is the component the sample is conditioned on, and a negative one means
        all components; without, conditioning is ignored.
        """
        alpha, sigma = self.schedule.alpha_sigma(timesteps, x_t.ndim, torch.promote_types(x_t.dtype, torch.float32))
        x0 = self.posterior_mean(x_t, timesteps, conditioning)
        eps = (x_t - alpha * x0) / sigma
        return self.prediction.from_x0_eps(x0, eps, alpha, sigma)

    def posterior_mean(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning | None = None) -> Tensor:
        """E[x0 | x_t], (B, C, h, w)."""
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        alpha, sigma = self.schedule.alpha_sigma(timesteps, x_t.ndim + 1, dtype)
        means = self.means.to(x_t.device, dtype)[None]
        variance = alpha**2 * self.std**2 + sigma**2
        away = x_t[:, None] - alpha * means
        log_likelihood = -(away**2).flatten(2).sum(-1) / (2 * variance.flatten(1))
        responsibilities = torch.softmax(log_likelihood + self._log_weights(len(x_t), conditioning).to(x_t.device, dtype), dim=1)
        by_component = means + alpha * self.std**2 / variance * away
        return (responsibilities.reshape(*responsibilities.shape, *(1,) * (x_t.ndim - 1)) * by_component).sum(1)

    def _log_weights(self, batch: int, conditioning: Conditioning | None) -> Tensor:
        weights = self.weights.log().expand(batch, -1)
        if not self.by_class or conditioning is None:
            return weights
        classes = conditioning.prompt_embeds[:, 0, 0].round().long().cpu()
        of_class = classes[:, None] == torch.arange(len(self.weights))
        return torch.where((classes[:, None] < 0) | of_class, weights, -math.inf)
