"""Any image model in transformers' layout (DINOv2, CLIP, SigLIP, ConvNeXt, ...) as a feature network: its pooled features."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.hub import first_line
from schemas.errors import BadInput
from stages.evaluate.feature_network import FeatureNetwork
from stages.transformers_files import check_model_files


def load_vision_model(device: str, weights: Path | None, field: str) -> FeatureNetwork:
    """Load a model with the normalisation of its own image processor; code that lies beside weights is not run.

    Its features are what it pools: of a model of pictures and texts the projected embedding of the picture. Pictures are shown whole, resized to the
    side of the processor's crop. Raises `BadInput`, naming the recipe's `field`, for what is no image model, or not a whole one.
    """
    from transformers import AutoImageProcessor, AutoModel  # noqa: PLC0415  # seconds to import, needed by few recipes

    assert weights is not None, "the recipe's own check"
    check_vision_model([path.name for path in weights.glob("*")], f"{field}: {weights}")
    try:
        processor: Any = AutoImageProcessor.from_pretrained(weights, trust_remote_code=False)  # type: ignore[no-untyped-call]
        model, told = AutoModel.from_pretrained(weights, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
        _check_whole(told["missing_keys"])
        side = _side(processor)
        network = _pooled(model.eval().requires_grad_(False).to(device), processor, device)
        with torch.inference_mode():
            network(torch.zeros(1, 3, side, side, device=device))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise BadInput(f"{field}: {weights}: {first_line(error)}; expected an image model with pooled features") from error
    return FeatureNetwork(network, f"{type(model).__name__} (transformers), {side} px", side)


def check_vision_model(names: Iterable[str], where: str) -> None:
    """Raise `BadInput` unless files of these names can be an image model; `where` is the recipe's field with its place."""
    check_model_files(names, ("*processor_config.json",), where, "an image model")


def _check_whole(missing: Collection[str]) -> None:
    if missing:
        raise ValueError(f"its weights lack {min(missing)}, which would be random")


def _side(processor: Any) -> int:
    """Side of the pictures that the processor hands to its model (pixels)."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    height, width = size.height or size.shortest_edge, size.width or size.shortest_edge
    if height is None or height != width:
        raise ValueError(f"its image processor makes pictures of {height} x {width} px")
    return int(height)


def _pooled(model: Any, processor: Any, device: str) -> Any:
    """A function from (B, 3, H, W) in 0..255 to (B, D)."""
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    shift, scale = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))
    embed = getattr(model, "get_image_features", model)

    def extract(images: Tensor) -> Tensor:
        pooled = embed(pixel_values=(images * factor - shift) / scale).pooler_output
        if pooled is None:
            raise ValueError(f"{type(model).__name__} pools nothing")
        features: Tensor = pooled.flatten(1)
        return features

    return extract
