"""Several LoRAs as one: the sum of low-rank changes is the low-rank change of the factors side by side, exactly."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stages.diffusion.lora import LORA_FILE, METADATA_KEY, lora_layers
from stages.diffusion.weights import save_tensors


def save_fused(unet: Any, weights: Mapping[str, float], folder: Path) -> Path:
    """Write the UNet's adapters, times `weights` by name, as one LoRA in diffusers layout, float32; returns the file.

    sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...] with s = alpha / rank: ranks add up, layer by layer, and the fused
    alpha is the fused rank. The adapters must still have the weight 1. Ranks are stored, since layers that fewer adapters change have lower ones.
    """
    tensors, ranks = {}, {}
    for layer, module in _named_layers(unet).items():
        present = [name for name in weights if name in module.lora_A]
        down = [module.lora_A[name].weight.detach().float() for name in present]
        up = [weights[name] * module.scaling[name] * module.lora_B[name].weight.detach().float() for name in present]
        tensors[f"unet.{layer}.lora_A.weight"] = torch.cat(down)
        tensors[f"unet.{layer}.lora_B.weight"] = torch.cat(up, dim=1)
        ranks[layer] = sum(len(factor) for factor in down)
    ((rank, _),) = Counter(ranks.values()).most_common(1)
    pattern = {f"^{layer}": own for layer, own in ranks.items() if own != rank}  # ^: else the name of one layer may end another's
    described = {
        "unet.r": rank,
        "unet.lora_alpha": rank,
        "unet.rank_pattern": pattern,
        "unet.alpha_pattern": pattern,
        "unet.target_modules": sorted(ranks),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LORA_FILE
    save_tensors(path, tensors, {"format": "pt", METADATA_KEY: json.dumps(described, sort_keys=True)})
    return path


def _named_layers(unet: Any) -> dict[str, Any]:
    layers = set(lora_layers(unet))
    return {name: module for name, module in sorted(unet.named_modules()) if module in layers}
