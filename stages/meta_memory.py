"""What a forward and a backward pass hold in memory, found by running them on the meta device: shapes and lifetimes without numbers."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map


@dataclass(frozen=True)
class Footprint:
    """Bytes beside the weights and their gradients."""

    held: int
    """Alive between the forward and the backward pass: what the backward pass needs."""
    peak: int
    """The most that was alive at once in both."""


def footprint(networks: Iterable[nn.Module], run: Callable[[], Tensor], precision: str, *, backward: bool = True) -> Footprint:
    """Run a pass of networks on the meta device. Gradients of weights are dropped as they come; `run` returns a tensor to descend.

    `precision` bfloat16 runs it as CUDA's autocast would (`_AsOnCuda`).
    """
    parameters = [parameter for network in networks for parameter in network.parameters()]
    hooks = [p.register_post_accumulate_grad_hook(_drop) for p in parameters if p.requires_grad]  # type: ignore[no-untyped-call]
    live = _LiveBytes(parameters)
    kernels = _AsOnCuda(low=precision == "bfloat16")
    try:
        with live, kernels, torch.set_grad_enabled(backward):
            loss = run()
            kernels.forget()
            held = live.now
            if backward:
                loss.sum().backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
    return Footprint(held, live.peak)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all storages that operations have made and that are still alive, now and at most."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary({tensor.untyped_storage(): None for tensor in known})

    def __torch_dispatch__(self, function: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen[storage] = None
                size = storage.nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, size)
        return output

    def _free(self, size: int) -> None:
        self.now -= size


_LOW = ("linear", "conv2d")
_WIDE = ("group_norm", "layer_norm")
"""Functions of `torch.nn.functional` that UNets are made of and that are on CUDA's lists of autocast: of low precision, and of float32."""


class _AsOnCuda:
    """What CUDA would do to shapes and types: fused attention, which holds no matrix of scores, and autocast, which keeps its casts of weights.

    The functions themselves are replaced for as long as it is entered: a torch function mode does not reach what checkpointing recomputes.
    """

    def __init__(self, *, low: bool) -> None:
        self.low = low
        self._casts: dict[int, Tensor] | None = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        def attention(query: Tensor, key: Tensor, value: Tensor, *_more: Any, **_settings: Any) -> Any:
            return _FusedAttention.apply(*self._in_low((query, key, value)))  # type: ignore[no-untyped-call]

        self._replace("scaled_dot_product_attention", attention)
        if self.low:
            for name in _LOW:
                self._replace(name, self._casting(getattr(F, name), self._in_low))
            for name in _WIDE:
                self._replace(name, self._casting(getattr(F, name), _in_float32))
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def forget(self) -> None:
        """Let the casts of weights go, as autocast does at its end, and keep no more: the backward pass is outside of it."""
        self._casts = None

    def _replace(self, name: str, function: Callable[..., Any]) -> None:
        self._stack.callback(setattr, F, name, getattr(F, name))
        setattr(F, name, function)

    def _casting(self, function: Callable[..., Any], cast: Callable[[Any], Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: function(*cast(args), **cast(kwargs))

    def _in_low(self, values: Any) -> Any:
        return tree_map(self._low, values) if self.low else values

    def _low(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if self._casts is None or not (value.is_leaf and value.requires_grad):
            return value.bfloat16()
        if id(value) not in self._casts:
            self._casts[id(value)] = value.bfloat16()
        return self._casts[id(value)]


def _in_float32(values: Any) -> Any:
    return tree_map(lambda value: value.float() if isinstance(value, Tensor) else value, values)


class _FusedAttention(torch.autograd.Function):
    """What flash attention (arXiv 2205.14135) keeps for its backward pass: its inputs, its output, and one number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, H, N, D) to (B, H, N, D)."""
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> Any:
        """Gradients of the three inputs."""
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
