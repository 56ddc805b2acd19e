"""The LAION aesthetic predictor (github.com/christophschuhmann/improved-aesthetic-predictor): CLIP image features, normalised, and an MLP."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from infra.torchvision_ops import define_missing_ops
from schemas.errors import BadInput

define_missing_ops()

from transformers import CLIPVisionModelWithProjection  # noqa: E402

_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's own, for pixels in 0..1
_STD = (0.26862954, 0.26130258, 0.27577711)
_LAYER = re.compile(r"^(?:(?:.*\.)?(\d+)\.)?(weight|bias)$")


class AestheticPredictor:
    """Scores pictures on LAION's scale, about 1 to 10.

    The folder holds a CLIP model in transformers' layout (the whole model or its vision tower; LAION's heads want ViT-L/14, such as
    `openai/clip-vit-large-patch14`) and `head.safetensors`, the head's linear layers under the names of the published files: `layers.<n>.weight` and
    `layers.<n>.bias`, applied in the order of `n` with nothing between them (`sac+logos+ava1-l14-linearMSE.pth`: 768-1024-128-64-16-1, with dropouts
    that are inactive when scoring and no activations), or `weight` and `bias` of a single layer (LAION-AI/aesthetic-predictor). The published
    files are pickles, which are never read here. To convert one:

        state = torch.load("sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
        safetensors.torch.save_file(state, "head.safetensors")
    """

    def __init__(self, clip: Any, head: Sequence[tuple[Tensor, Tensor]], device: str) -> None:
        self.clip = clip.eval().to(device)
        """CLIPVisionModelWithProjection."""
        self.head = [(weight.to(device), bias.to(device)) for weight, bias in head]
        self.device = device
        self.image_size = int(self.clip.config.image_size)

    @classmethod
    def load(cls, folder: Path, device: str) -> Self:
        """Load from a folder. Raises `BadInput` naming what is missing or does not fit."""
        try:
            loaded: Any = CLIPVisionModelWithProjection.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
            clip, loading = loaded
            head = linear_layers(load_file(folder / "head.safetensors"))
        except (OSError, ValueError, SafetensorError) as error:
            raise BadInput(f"aesthetic predictor {folder}: expected a CLIP model and head.safetensors ({error})") from error
        absent = sorted({*loading["missing_keys"], *(entry[0] for entry in loading["mismatched_keys"])})
        if absent:  # transformers would draw them at random
            raise BadInput(
                f"aesthetic predictor {folder}: the CLIP model lacks {', '.join(absent[:3])}; expected a vision tower with its projection"
            )
        widths = [int(clip.config.projection_dim), *(bias.shape[0] for _, bias in head)]
        shapes = [tuple(weight.shape) for weight, _ in head]
        if widths[-1] != 1 or shapes != list(zip(widths[1:], widths, strict=False)):
            raise BadInput(
                f"aesthetic predictor {folder}: layers of head.safetensors are {shapes}; expected a chain from {widths[0]} features to 1"
            )
        return cls(clip, head, device)

    @torch.inference_mode()
    def score(self, pictures: Sequence[NDArray[np.uint8]]) -> list[float]:
        """Scores of (S, S, 3) RGB pixels, with S the CLIP model's image size (`stages.measure.looks.clip_pixels`), rounded to six digits."""
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(self.device) / 255
        mean, std = (torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (_MEAN, _STD))
        features: Tensor = self.clip((pixels - mean) / std).image_embeds
        hidden: Tensor = features / features.norm(dim=-1, keepdim=True)
        for weight, bias in self.head:
            hidden = torch.nn.functional.linear(hidden, weight, bias)
        return [float(f"{score:.6g}") for score in hidden.float().cpu()[:, 0].tolist()]


def linear_layers(state: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of the layers of a state dict in the order of their numbers; without a number there is one. Raises `ValueError`."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = _LAYER.match(name)
        if match is None:
            raise ValueError(f"unexpected tensor {name} in the head")
        found.setdefault(int(match[1] or 0), {})[match[2]] = tensor.float()
    if any(len(layer) != 2 for layer in found.values()):
        raise ValueError("a layer of the head lacks its weight or its bias")
    return [(layer["weight"], layer["bias"]) for _, layer in sorted(found.items())]
