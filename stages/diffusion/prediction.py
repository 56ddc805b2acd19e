"""What a denoiser's output means: noise, velocity or the clean sample. One class each; all arithmetic in float32 or wider.

With alpha = sqrt(abar_t) and sigma = sqrt(1 - abar_t): x_t = alpha x0 + sigma eps, v = alpha eps - sigma x0
(progressive distillation, arXiv 2202.00512, appendix D).
"""
# ruff: noqa: ARG002  # one signature for all types, though noise needs no alpha to be noise

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from schemas.errors import BadInput


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or as it is where it is wider: 1/sqrt(abar_999) = 14.65 amplifies the rounding of half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class PredictionType(ABC):
    """Converts a model's output (B, C, h, w) at x_t to x0 and eps and back; alpha and sigma broadcast, such as (B, 1, 1, 1)."""

    name: ClassVar[str]
    """As in diffusers' scheduler configurations."""

    @abstractmethod
    def to_x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The clean sample the output implies."""

    @abstractmethod
    def to_eps(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The noise the output implies."""

    @abstractmethod
    def from_x0_eps(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The output that means this x0 and eps: the regression target of a training step."""

    def to_x0_eps(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Both, consistent with each other: alpha x0 + sigma eps = x_t."""
        return self.to_x0(output, x_t, alpha, sigma), self.to_eps(output, x_t, alpha, sigma)


class Epsilon(PredictionType):
    """The output is the noise (DDPM, arXiv 2006.11239). x0 needs alpha > 0: not for schedules with zero terminal SNR."""

    name = "epsilon"

    def to_x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(x_t - sigma eps) / alpha."""
        return (wide(x_t) - sigma * wide(output)) / alpha

    def to_eps(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The output."""
        return wide(output)

    def from_x0_eps(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Eps."""
        return wide(eps)


class VPrediction(PredictionType):
    """The output is the velocity alpha eps - sigma x0 (progressive distillation, arXiv 2202.00512)."""

    name = "v_prediction"

    def to_x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """alpha x_t - sigma v."""
        return alpha * wide(x_t) - sigma * wide(output)

    def to_eps(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """sigma x_t + alpha v."""
        return sigma * wide(x_t) + alpha * wide(output)

    def from_x0_eps(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """alpha eps - sigma x0."""
        return alpha * wide(eps) - sigma * wide(x0)


class Sample(PredictionType):
    """The output is x0, as one-step students predict (SDXL-Lightning, arXiv 2402.13929, 3.7.3). Eps needs sigma > 0."""

    name = "sample"

    def to_x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The output."""
        return wide(output)

    def to_eps(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(x_t - alpha x0) / sigma."""
        return (wide(x_t) - alpha * wide(output)) / sigma

    def from_x0_eps(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x0."""
        return wide(x0)


PREDICTION_TYPES: Mapping[str, PredictionType] = {kind.name: kind for kind in (Epsilon(), VPrediction(), Sample())}


def prediction_type(name: str) -> PredictionType:
    """Return a prediction type by diffusers' name. Raises `BadInput` with the names there are."""
    try:
        return PREDICTION_TYPES[name]
    except KeyError:
        raise BadInput(f"prediction_type {name!r} is not supported; expected one of {', '.join(PREDICTION_TYPES)}") from None
