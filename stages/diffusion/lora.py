"""Low-rank adapters (LoRA, arXiv 2106.09685) on a UNet: added from a seed, saved in diffusers' layout with alpha, merged without a trace.

One network may have several, of which one at a time takes effect (`under`): as many networks in the memory of one.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from schemas.errors import BadInput
from stages.diffusion.weights import save_tensors

LORA_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
"""Every conv and linear except input conv, output conv and the shared time-embedding linears (SDXL-Lightning, arXiv 2402.13929, 3.6; LCM-LoRA)."""

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name `load_lora_weights` looks for in a folder."""

ADAPTER = "default"
"""The name of a network's only adapter, and of the one among several that is saved."""

METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers' loaders read rank and alpha from."""


def add_lora(unet: Any, rank: int, alpha: float, *, seed: int, adapter: str = ADAPTER) -> list[nn.Parameter]:
    """Add an adapter that changes nothing yet (B = 0) and freeze the rest; returns its parameters, in the order of their names.

    A second one needs a name of its own; the one that was added last takes effect.

    A is drawn as in the reference implementation, Kaiming-uniform with a = sqrt(5), from `seed` alone: the global random state is neither read nor
    moved. The output is scaled by alpha / rank. Raises `BadInput` when the UNet has an adapter of this name already.
    """
    if adapter in getattr(unet, "peft_config", {}):
        raise BadInput("UNet: it has a LoRA adapter already; merge or remove it first")
    with torch.random.fork_rng(devices=[]):
        unet.add_adapter(lora_config(rank, alpha), adapter_name=adapter)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in _named_adapter_parameters(unet, adapter):
        drawn = torch.zeros(parameter.shape)
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            parameter.copy_(drawn)
    return lora_parameters(unet, adapter)


def lora_config(rank: int, alpha: float) -> LoraConfig:
    """peft's description of the adapter."""
    settings: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(LORA_TARGETS),
    }  # peft declares alpha int, and takes floats
    return LoraConfig(**settings)


def lora_parameters(unet: Any, adapter: str = ADAPTER) -> list[nn.Parameter]:
    """The adapter's parameters in the order of their names; the same ones that require gradients after `add_lora`."""
    return [parameter for _, parameter in _named_adapter_parameters(unet, adapter)]


def lora_state(unet: Any) -> dict[str, Tensor]:
    """The adapter's tensors by peft's names, such as `down_blocks.0.resnets.0.conv1.lora_A.weight`, sorted."""
    return dict(sorted(get_peft_model_state_dict(unet, adapter_name=ADAPTER).items()))


def load_lora_state(unet: Any, state: Mapping[str, Tensor]) -> None:
    """Set the tensors of an adapter that `add_lora` added. Raises `BadInput` when names differ."""
    expected = lora_state(unet).keys()
    if expected != state.keys():
        raise BadInput(
            f"LoRA state: {len(expected ^ state.keys())} names differ from the adapter's, such as {min(expected ^ state.keys())}"
        )
    set_peft_model_state_dict(unet, dict(state), adapter_name=ADAPTER)


def save_lora(unet: Any, folder: Path, dtype: torch.dtype | None = None) -> Path:
    """Write the adapter as `pytorch_lora_weights.safetensors` in `folder`, loadable by `pipeline.load_lora_weights(folder)`; returns the file.

    Rank, alpha and targets are stored, so that alpha != rank survives. The bytes depend on the adapter alone. `dtype` casts the tensors.
    """
    config = unet.peft_config[ADAPTER]
    # Only what rebuilds the adapter: peft's whole configuration differs from version to version, and its target set has no order.
    described = {"unet.r": config.r, "unet.lora_alpha": config.lora_alpha, "unet.target_modules": list(LORA_TARGETS)}
    tensors = {f"unet.{name}": tensor.to(dtype=dtype) for name, tensor in lora_state(unet).items()}
    path = folder / LORA_FILE
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors, {"format": "pt", METADATA_KEY: json.dumps(described, sort_keys=True)})
    return path


def load_lora(unet: Any, folder: Path) -> list[nn.Parameter]:
    """Add the adapter saved in `folder` to a UNet without one; returns its parameters, trainable.

    Raises `BadInput` for a file that is none of ours.
    """
    rank, alpha, state = read_lora(folder)
    parameters = add_lora(unet, rank, alpha, seed=0)
    load_lora_state(unet, state)
    return parameters


def read_lora(folder: Path) -> tuple[int, float, dict[str, Tensor]]:
    """Rank, alpha and tensors by peft's names of the adapter saved in `folder`. Raises `BadInput` for a file that is none of ours."""
    rank, alpha = rank_and_alpha(folder)
    with _opened(folder / LORA_FILE) as file:
        state = {name.removeprefix("unet."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    return rank, alpha, state


def rank_and_alpha(folder: Path) -> tuple[int, float]:
    """Of the adapter saved in `folder`. Raises `BadInput` for a file that is none of ours."""
    path = folder / LORA_FILE
    with _opened(path) as file:
        described = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    if not {"unet.r", "unet.lora_alpha"} <= described.keys():
        raise BadInput(f"{path}: rank and alpha are not stored; expected metadata {METADATA_KEY} with unet.r and unet.lora_alpha")
    return int(described["unet.r"]), float(described["unet.lora_alpha"])


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: cannot be read ({error}); expected a LoRA in diffusers layout") from error


def merge_lora(unet: Any) -> None:
    """Add the adapter into the weights and remove it: afterwards the UNet has the names and modules of one that never had an adapter.

    All parameters require gradients again.
    """
    unet.fuse_lora()
    remove_lora(unet)


def remove_lora(unet: Any) -> None:
    """Remove the adapter and its traces (deleting adapters alone leaves `base_layer` names, which reload broken)."""
    unet.unload_lora()
    unet.requires_grad_(True)


def lora_layers(unet: Any) -> list[Any]:
    """The layers that carry an adapter."""
    return [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]


def active_adapter(layer: Any) -> str | None:
    """The adapter of a layer that takes effect; None where none does."""
    return None if layer._disable_adapters else str(layer.active_adapters[0])


def without_lora(layers: Sequence[Any]) -> AbstractContextManager[None]:
    """The network of these layers as it was before its adapter was added."""
    return under(layers, None)


@contextmanager
def under(layers: Sequence[Any], adapter: str | None) -> Iterator[None]:
    """The network of these layers with the change of one of its adapters, or of none; afterwards with that of before.

    `set_adapter`, `disable_adapters` and `enable_adapters` of diffusers do the same at a tenth of a small network's training step: they walk through
    all modules and freeze and free every weight.
    """
    before = active_adapter(layers[0]) if layers else None
    _activate(layers, adapter)
    try:
        yield
    finally:
        _activate(layers, before)


def _activate(layers: Sequence[Any], adapter: str | None) -> None:
    for layer in layers:
        layer._disable_adapters = adapter is None
        if adapter is not None:
            layer._active_adapter = [adapter]


def checkpoint_under_adapter(module: nn.Module, *inputs: Any) -> Any:
    """A function for diffusers' `enable_gradient_checkpointing`: the backward pass recomputes a part of the network under the adapter that took
    effect in the forward pass, whichever does by then."""
    layers = lora_layers(module)
    if not layers:
        return checkpoint(module.__call__, *inputs, use_reentrant=False)
    adapter = active_adapter(layers[0])
    return checkpoint(module.__call__, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), under(layers, adapter)))


def _named_adapter_parameters(unet: Any, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    own = (f".lora_A.{adapter}.", f".lora_B.{adapter}.")
    named = ((name, parameter) for name, parameter in unet.named_parameters() if any(part in name for part in own))
    return iter(sorted(named, key=lambda item: item[0]))
