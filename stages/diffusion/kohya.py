"""LoRA files in the key format of kohya's trainer, which ComfyUI and A1111 read: written from ours, and read back bit for bit.

A module's tensors are `lora_unet_<module>.lora_down.weight`, `.lora_up.weight` and `.alpha`. For SD1.x and SD2.x `<module>` is diffusers' name with
`_` for `.`; for SDXL it is the name in the original (SGM) network, whose blocks are numbered through. diffusers' own writer,
`convert_state_dict_to_kohya`, serves for neither: it writes the rank where alpha belongs, so that a LoRA with another alpha comes back with another
strength, and diffusers' block names for SDXL, which kohya's trainer does not know.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from schemas.errors import BadInput
from stages.diffusion.lora import add_lora, load_lora_state, lora_state, read_lora
from stages.diffusion.weights import save_tensors

_PREFIX = "lora_unet_"
_SUFFIXES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
"""A residual block's layers in the SGM network."""
_BLOCK = re.compile(
    r"(?P<side>down_blocks|up_blocks)\.(?P<block>\d+)\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<layer>\d+)\.(?P<rest>.+)"
)
_MIDDLE = re.compile(r"mid_block\.(?P<kind>resnets|attentions)\.(?P<layer>\d+)\.(?P<rest>.+)")


def kohya_module(module: str, unet_config: Mapping[str, Any]) -> str:
    """Name of a module of a UNet (`down_blocks.1.attentions.0.proj_in`) in kohya's files, without prefix. Raises `BadInput` for one without."""
    named = _sgm_module(module, unet_config) if _is_sdxl(unet_config) else module
    return named.replace(".", "_")


def save_kohya(folder: Path, unet_config: Mapping[str, Any], path: Path) -> None:
    """Write the LoRA that `save_lora` wrote in `folder` as a kohya file. The bytes depend on the adapter and the UNet's configuration alone.

    Raises `BadInput` for a file that is none of ours, or a layer that the format has no name for.
    """
    rank, alpha, state = read_lora(folder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        key = _key(name, unet_config)
        tensors[key] = tensor
        tensors[f"{key.partition('.')[0]}.alpha"] = _scalar(alpha)
    # A1111 takes a file for SD1's unless these say otherwise, and does not offer it to another model.
    version = {"ss_base_model_version": "sdxl_base_v1-0"} if _is_sdxl(unet_config) else {"ss_v2": str(_is_sd2(unet_config))}
    described = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(alpha)}
    save_tensors(path, tensors, {"format": "pt"} | version | described)


def load_kohya(unet: Any, path: Path) -> list[nn.Parameter]:
    """Add the adapter of a kohya file to a UNet without one; returns its parameters, trainable.

    Raises `BadInput` for a file that cannot be read, that lacks a layer our adapters have or has another, or whose layers differ in rank or alpha.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: cannot be read ({error}); expected a LoRA in kohya's key format") from error
    ranks = {name.partition(".")[0]: len(tensor) for name, tensor in found.items() if name.endswith(".lora_down.weight")}
    alphas = {name.partition(".")[0]: found.pop(name).item() for name in list(found) if name.endswith(".alpha")}
    sizes = {(rank, alphas.get(module, rank)) for module, rank in ranks.items()}  # without an alpha it is the rank
    if len(sizes) != 1:
        raise BadInput(f"{path}: (rank, alpha) of its modules are {sorted(sizes)}; expected one pair for all")
    [(rank, alpha)] = sizes
    parameters = add_lora(unet, rank, alpha, seed=0)
    state = {}
    for name in lora_state(unet):
        key = _key(name, unet.config)
        if key not in found:
            raise BadInput(f"{path}: has no {key}; expected an adapter of all layers that ours have")
        state[name] = found.pop(key)
    if found:
        raise BadInput(f"{path}: {min(found)} is of no layer of this UNet that our adapters have")
    load_lora_state(unet, state)
    return parameters


def _key(name: str, unet_config: Mapping[str, Any]) -> str:
    """The key of a tensor that peft names `<module>.lora_A.weight`."""
    module, _, which = name.rpartition(".lora_")
    return f"{_PREFIX}{kohya_module(module, unet_config)}.{_SUFFIXES[f'lora_{which}']}"


def _sgm_module(module: str, unet_config: Mapping[str, Any]) -> str:
    """Name in the SGM network: its blocks are diffusers' layers, numbered through, the input convolution being the first."""
    layers = unet_config["layers_per_block"]
    if middle := _MIDDLE.fullmatch(module):
        if middle["kind"] == "attentions":
            return f"middle_block.1.{middle['rest']}"
        return f"middle_block.{2 * int(middle['layer'])}.{_RESNET[middle['rest']]}"
    found = _BLOCK.fullmatch(module)
    if found is None or not isinstance(layers, int):
        raise BadInput(f"UNet layer {module}: has no name in the SGM network; expected a layer of SDXL's UNet")
    block, layer, rest = int(found["block"]), int(found["layer"]), found["rest"]
    if found["kind"] == "resnets":
        rest = f"0.{_RESNET[rest]}"
    elif found["kind"] == "attentions":
        rest = f"1.{rest}"
    elif found["kind"] == "downsamplers":
        layer, rest = layers, "0.op"
    else:
        attends = "Attn" in unet_config["up_block_types"][block]
        layer, rest = layers, f"{2 if attends else 1}.{rest}"
    number = block * (layers + 1) + layer
    return f"input_blocks.{1 + number}.{rest}" if found["side"] == "down_blocks" else f"output_blocks.{number}.{rest}"


def _is_sdxl(unet_config: Mapping[str, Any]) -> bool:
    return unet_config.get("addition_embed_type") == "text_time"


def _is_sd2(unet_config: Mapping[str, Any]) -> bool:
    return bool(unet_config.get("use_linear_projection"))


def _scalar(alpha: float) -> Tensor:
    """Alpha in float32, as kohya's trainer stores it, or in float64 where that would change it."""
    narrow = torch.tensor(alpha, dtype=torch.float32)
    return narrow if narrow.item() == alpha else torch.tensor(alpha, dtype=torch.float64)
