"""LoRA files held against a base: found, read by their headers alone, and refused where they do not fit."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

from schemas.errors import BadInput
from stages.diffusion.facts import read_config
from stages.diffusion.kohya import kohya_module
from stages.diffusion.lora import LORA_FILE, LORA_TARGETS
from stages.diffusion.weights import find_weights, read_header

Shape = tuple[int, ...]

_UNET = ("unet", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json", "model_index.json")
"""Where one of these lies and no LoRA, a whole network was given."""

_KOHYA = "lora_unet_"
_ORIGINAL_BLOCKS = ("input_blocks_", "middle_block_", "output_blocks_")
"""Kohya's names by the original code's blocks, not diffusers'."""


def find_lora(place: str, field: str) -> Path:
    """Return the LoRA file at `place`, a file or a folder with one of diffusers' name. Raises `BadInput`, naming `field`."""
    path = Path(place.removeprefix("file://")).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise BadInput(f"{field} {place}: no such file or folder; expected a LoRA in diffusers layout")
    if (path / LORA_FILE).is_file():
        return path / LORA_FILE
    if any((path / name).exists() for name in _UNET):
        raise BadInput(f"{field} {place}: a whole network; expected a LoRA ({LORA_FILE}), for only low-rank changes can be added up")
    raise BadInput(f"{field} {place}: expected {LORA_FILE} in it")


def check_fits(file: Path, base: Path, field: str) -> None:
    """Hold the shapes of a LoRA against the UNet of the pipeline folder `base`, by the files' headers alone.

    Raises `BadInput`, naming `field`, for a file that is no LoRA of a UNet alone, and for layers that the base lacks or has of another shape.
    """
    layers = _unet_layers(base)
    factors = _factors(file, field, _kohya_names(file, base, layers))
    for name, (down, up) in factors.items():
        if name not in layers:
            raise BadInput(
                f"{field} {file.name}: changes the layer {name}, which the base does not have; expected a LoRA of its architecture"
            )
        changed = (up[0], *down[1:])
        if changed != layers[name]:
            expected = f"the base's is {times(layers[name])}; expected a LoRA of a base with the same shapes"
            raise BadInput(f"{field} {file.name}: made for another UNet: its {name} is {times(changed)}, {expected}")


def _kohya_names(file: Path, base: Path, layers: Iterable[str]) -> dict[str, str]:
    """Layers by their names in kohya's files, with underscores; also by those of the original code's blocks where the file has them."""
    names = {name.replace(".", "_"): name for name in layers}
    if any(name.startswith(tuple(_KOHYA + block for block in _ORIGINAL_BLOCKS)) for name in read_header(file)):
        config = read_config(base, "unet")
        names |= {kohya_module(name, config): name for name in layers if name.endswith(LORA_TARGETS)}
    return names


def _unet_layers(base: Path) -> dict[str, Shape]:
    """Shapes of the UNet's weights by layer name: (out, in), of a convolution (out, in, kernel, kernel)."""
    headers = [read_header(path) for path in find_weights(base / "unet").files]
    return {name.removesuffix(".weight"): tuple(entry["shape"]) for header in headers for name, entry in header.items()}


def _factors(file: Path, field: str, kohya: Mapping[str, str]) -> dict[str, tuple[Shape, Shape]]:
    """Shapes of A and B by layer; none for names of layers that ours never change, which only diffusers' loader can tell. `kohya` gives a layer's
    name by that with underscores."""
    header = read_header(file)
    if not any("lora" in name for name in header):
        what = "the weights of a whole network" if any(name.startswith(("conv_in.", "unet.conv_in.")) for name in header) else "no LoRA"
        raise BadInput(f"{field} {file.name}: holds {what}; expected a LoRA in diffusers layout")
    if any("dora" in name or "magnitude" in name for name in header):
        raise BadInput(f"{field} {file.name}: is a DoRA; expected a LoRA, for only low-rank changes can be added up")
    others = sorted(name for name in header if not name.startswith(("unet.", _KOHYA)))
    if others:
        raise BadInput(f"{field} {file.name}: holds tensors that are not of a UNet, such as {others[0]}; expected a LoRA of the UNet alone")
    found: dict[str, list[Shape | None]] = {}
    for name, shape in _shapes(header).items():
        layer, separator, side = name.removeprefix("unet.").partition(".lora_")
        if not separator or not side.endswith("weight"):
            continue  # an alpha
        if layer.startswith(_KOHYA):
            layer = layer.removeprefix(_KOHYA)
            if layer.startswith(_ORIGINAL_BLOCKS) and layer not in kohya:
                continue
            layer = kohya.get(layer, layer)
        found.setdefault(layer, [None, None])[0 if side.startswith(("A", "down")) else 1] = shape
    pairs: dict[str, tuple[Shape, Shape]] = {}
    for layer, (down, up) in found.items():
        if down is None or up is None or len(down) < 2 or len(up) < 2 or down[0] != up[1] or math.prod(up[2:]) != 1:
            raise BadInput(f"{field} {file.name}: {layer}: its two factors do not belong together; expected a whole LoRA")
        pairs[layer] = (down, up)
    if not pairs:
        raise BadInput(f"{field} {file.name}: changes no layer that the base has; expected a LoRA of its architecture")
    return pairs


def _shapes(header: Mapping[str, Mapping[str, list[int]]]) -> dict[str, Shape]:
    convert: Any = convert_unet_state_dict_to_peft  # names only: what they stand for may be anything
    return {name: tuple(entry["shape"]) for name, entry in convert(dict(header)).items()}


def times(shape: Shape) -> str:
    """A shape for people: `4 x 320 x 3 x 3`."""
    return " x ".join(map(str, shape))
