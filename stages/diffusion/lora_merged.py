"""Training a LoRA with its change added to the weights in every pass, where that is less work than a branch beside each layer.

A layer's adapter computes W x + s B (A x): two products more in the forward pass and four in the backward pass. (W + s B A) x is the same but for
float rounding, and needs four in the backward pass alone, those of the gradients of A and B. The sum costs what the branch costs for fewer rows
than the layer has inputs or outputs, so it pays wherever a network sees more than a few samples. Where it is small beside the adapter it is kept
until the backward pass, and serves all passes until then; elsewhere it is made again for the backward pass.
"""

from types import MethodType
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from stages.diffusion.lora import active_adapter, lora_layers

_KEPT_BESIDE_ADAPTER: Final = 3
"""Times the adapter that a kept sum is at most: with Adam's moments and gradients an adapter takes four times itself already."""


class _Sum(NamedTuple):
    """W + s B A, and the versions of A and B that it was made of."""

    weight: Tensor
    of: tuple[int, int]


_SUMS: "WeakKeyDictionary[nn.Module, dict[str, _Sum]]" = WeakKeyDictionary()
"""By layer and adapter. Not in the layer itself, of which copies are made."""


def merge_in_training(unet: Any) -> None:
    """Have the layers of adapters that `add_lora` added choose the cheaper way in every pass in training mode.

    Only float32 does: in lower precision the sum would round the change away. In evaluation mode the layers are peft's, bit for bit.
    """
    for layer in lora_layers(unet):
        smallest = min(layer.lora_A[name].weight.numel() + layer.lora_B[name].weight.numel() for name in layer.lora_A)
        layer.keeps_sum = layer.get_base_layer().weight.numel() <= _KEPT_BESIDE_ADAPTER * smallest
        layer.forward = MethodType(_forward, layer)  # a bound method: a copy of the network gets its own


def keep_no_sums(network: nn.Module) -> None:
    """Have the layers make their sums in every pass: for weights that are gathered and let go again, which kept sums would outlive."""
    for layer in lora_layers(network):
        layer.keeps_sum = False


def merging_is_cheaper(x: Tensor, base: nn.Linear | nn.Conv2d, rank: int, *, gradients: bool) -> bool:
    """Count products of numbers: of the sum, twice with gradients, against those of the branch that it saves."""
    weight = base.weight
    out, size = weight.shape[0], weight.numel()
    inputs = x.shape[-1] if isinstance(base, nn.Linear) else x.shape[1] * base.stride[0] * base.stride[1]
    branch = x.numel() // inputs * rank * (size // out + out)
    return (2 if gradients else 1) * rank * size < branch


def _forward(layer: Any, x: Tensor) -> Tensor:
    output: Tensor
    base, adapter = layer.base_layer, active_adapter(layer)
    if not layer.training or layer.merged:
        output = type(layer).forward(layer, x)
    elif adapter is None:
        output = base(x)
    elif (
        x.dtype == torch.float32
        and not _autocast(x.device.type)
        and merging_is_cheaper(x, base, layer.r[adapter], gradients=torch.is_grad_enabled())
    ):
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        output = _Merged.apply(x, base.weight, base.bias, a, b, layer, adapter)  # type: ignore[no-untyped-call]
    else:
        output = type(layer).forward(layer, x)
    return output


def _autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


class _Merged(Function):
    """A linear layer or a convolution with W + s B A; gradients for x, A and B."""

    @staticmethod
    def forward(  # noqa: PLR0917 - what gradients are for goes in by position
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, layer: Any, adapter: str
    ) -> Tensor:
        """x (..., in) or (B, in, h, w); a and b are the `adapter`'s."""
        ctx.save_for_backward(x, weight, a, b)
        ctx.layer, ctx.adapter = layer, adapter
        merged = _sum(layer, adapter, weight, a, b)
        return F.linear(x, merged, bias) if weight.ndim == 2 else F.conv2d(x, merged, bias, *_settings(layer))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """dL/dx through the sum; dL/dA and dL/dB by the cheaper of two ways."""
        (gradient,) = gradients
        x, weight, a, b = ctx.saved_tensors
        layer, adapter = ctx.layer, ctx.adapter  # another adapter may take effect by now
        scale = layer.scaling[adapter]
        of_x = None
        if ctx.needs_input_grad[0]:
            merged = _sum(layer, adapter, weight, a, b)
            of_x = F.linear(gradient, merged.T) if weight.ndim == 2 else _convolution_backward(layer, gradient, x, merged, of_weight=False)
        _forget(layer, adapter)  # an update may follow, and not all that change weights say so
        if _sum_is_shorter(gradient, weight, a, b):
            of_a, of_b = _through_sum(layer, gradient, x, a, b)
        else:
            of_a, of_b = _through_factors(layer, gradient, x, a, b)
        return of_x, None, None, of_a.mul_(scale), of_b.mul_(scale), None, None


def _sum_is_shorter(gradient: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> bool:
    """Count products of numbers on either way to the gradients of A and B."""
    rows = gradient.numel() // len(weight)
    return (rows + 2 * len(a)) * weight.numel() < 2 * rows * (a.numel() + b.numel())


def _through_sum(layer: Any, gradient: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """B^T G and G A^T with G the gradient of the sum."""
    if a.ndim == 2:
        whole = _rows(gradient, 2).T @ _rows(x, 2)
        return b.T @ whole, whole @ a.T
    like = layer.get_base_layer().weight
    whole = _flat(_convolution_backward(layer, gradient, x, like, of_weight=True))
    return _shaped(_flat(b).T @ whole, a), _shaped(whole @ _flat(a).T, b)


def _through_factors(layer: Any, gradient: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of B (A x), without the gradient of x."""
    if a.ndim == 2:
        rows, inputs = _rows(gradient, 2), _rows(x, 2)
        return (rows @ b).T @ inputs, rows.T @ (inputs @ a.T)
    inner = F.conv2d(x, a, None, *_settings(layer))
    of_inner = F.conv2d(gradient, b.transpose(0, 1))
    of_a = _convolution_backward(layer, of_inner, x, a, of_weight=True)
    return of_a, _shaped(_rows(gradient, 4).T @ _rows(inner, 4), b)


def _convolution_backward(layer: Any, gradient: Tensor, x: Tensor, weight: Tensor, *, of_weight: bool) -> Tensor:
    """The gradient of the weight, or of x."""
    mask = [not of_weight, of_weight, False]
    found = torch.ops.aten.convolution_backward(gradient, x, weight, None, *_settings(layer), False, [0, 0], 1, mask)
    result: Tensor = found[int(of_weight)]
    return result


def _settings(layer: Any) -> tuple[Any, ...]:
    base = layer.base_layer
    return base.stride, base.padding, base.dilation


@torch.no_grad()
def _sum(layer: Any, adapter: str, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """W + s B A, kept or made."""
    of = (a._version, b._version)
    found = _SUMS.get(layer, {}).get(adapter)
    if found is None or found.of != of:
        found = _Sum(_shaped(torch.addmm(_flat(weight), _flat(b), _flat(a), alpha=layer.scaling[adapter]), weight), of)
        if layer.keeps_sum:
            _SUMS.setdefault(layer, {})[adapter] = found
    return found.weight


def _forget(layer: Any, adapter: str) -> None:
    kept = _SUMS.get(layer, {})
    kept.pop(adapter, None)
    if not kept:
        _SUMS.pop(layer, None)


def _rows(values: Tensor, ndim: int) -> Tensor:
    """(..., C), or (B, C, h, w) where `ndim` is 4, as a matrix (rows, C)."""
    return (values if ndim == 2 else values.permute(0, 2, 3, 1)).reshape(-1, values.shape[-1 if ndim == 2 else 1])


def _flat(weight: Tensor) -> Tensor:
    """(out, in) or (out, in, k, k) as a matrix (out, in k k), channels last: the layout that networks are trained in."""
    return weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def _shaped(matrix: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_flat`."""
    if like.ndim == 2:
        return matrix
    out, channels, height, width = like.shape
    return matrix.view(out, height, width, channels).permute(0, 3, 1, 2)
