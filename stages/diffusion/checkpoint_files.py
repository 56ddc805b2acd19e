"""UNets and LoRAs from elsewhere: found, held against a base by their headers alone, and loaded onto a copy of its UNet."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors.torch import load_file

from schemas.errors import BadInput
from stages.diffusion.facts import MODEL_INDEX, read_config
from stages.diffusion.guidance import EMBEDDED_DIM, add_guidance_input
from stages.diffusion.lora import LORA_FILE
from stages.diffusion.lora_files import check_fits, times
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.weights import STEMS, find_weights, read_header

EXPECTED: Final = "expected a LoRA or a UNet with diffusers' names: a safetensors file, or a folder in diffusers layout"

_GUIDANCE: Final = "time_embedding.cond_proj.weight"
"""The layer by which a UNet is told the guidance scale."""

_SHAPELESS: Final = (
    "attention_head_dim", "num_attention_heads", "use_linear_projection", "addition_embed_type", "addition_time_embed_dim", "norm_num_groups",
    "resnet_time_scale_shift", "flip_sin_to_cos", "freq_shift", "act_fn",
)  # fmt: skip
"""Fields of a UNet's configuration that change what it computes and may leave every shape as it is."""


@dataclass(frozen=True)
class Checkpoint:
    """A LoRA, or the weights of a UNet."""

    kind: Literal["lora", "unet"]
    files: tuple[Path, ...]
    """The LoRA's one file, or the UNet's, whole or in shards."""
    unet_config: Mapping[str, Any] = field(default_factory=dict)
    """Of a UNet that came with one."""
    scheduler_config: Mapping[str, Any] = field(default_factory=dict)
    """What lies beside it in `scheduler/`."""

    @property
    def takes_guidance(self) -> bool:
        """Whether it is a UNet that is told the guidance scale."""
        return self.kind == "unet" and any(_GUIDANCE in read_header(file) for file in self.files)


def find_checkpoint(path: Path, field: str) -> Checkpoint:
    """What lies at a path: a file, or a folder of a LoRA, a UNet or a pipeline. Reads headers and configurations alone.

    Raises `BadInput`, naming `field`, where it is nothing of the kind, is pickled, or has the names of the original code.
    """
    if path.is_file():
        return _of_file(path, field)
    if not path.is_dir():
        raise BadInput(f"{field} {path}: no such file or folder; {EXPECTED}")
    scheduler = read_config(path, "scheduler", "scheduler_config.json") if (path / "scheduler" / "scheduler_config.json").is_file() else {}
    if (path / LORA_FILE).is_file():
        return Checkpoint("lora", (path / LORA_FILE,), scheduler_config=scheduler)
    unet = path / "unet" if (path / "unet").is_dir() or (path / MODEL_INDEX).is_file() else path
    if (unet / "config.json").is_file():
        config = read_config(unet.parent, unet.name)
        if config.get("_class_name") != "UNet2DConditionModel":
            raise BadInput(f"{field} {path}: holds a {config.get('_class_name', 'network without a class')}; {EXPECTED}")
        return Checkpoint("unet", find_weights(unet, _variant(unet)).files, config, scheduler)
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        names = ", ".join(sorted(item.name for item in path.iterdir())[:5]) or "nothing"
        raise BadInput(f"{field} {path}: found {names}; {EXPECTED}")
    return _of_file(files[0], field)


def wanted(path: str) -> bool:
    """Whether a file of a remote folder, by its path in it, is needed."""
    folder, _, name = path.rpartition("/")
    named = name == LORA_FILE or (name.startswith(STEMS) and name.endswith((".safetensors", ".json")))
    return (folder in ("", "unet") and (named or name == "config.json")) or path in (MODEL_INDEX, "scheduler/scheduler_config.json")


def check_checkpoint(checkpoint: Checkpoint, base: Path, field: str) -> None:
    """Hold a checkpoint against the UNet of the pipeline folder `base`. Raises `BadInput`, naming `field`, for layers that the base lacks, that are
    missing, or that are of another shape."""
    if checkpoint.kind == "lora":
        check_fits(checkpoint.files[0], base, field)
        return
    name = f"{field} {checkpoint.files[0].name}"
    own, theirs = _shapes(find_weights(base / "unet").files), _shapes(checkpoint.files)
    if theirs.get(_GUIDANCE, (0, EMBEDDED_DIM))[1] == EMBEDDED_DIM:
        theirs.pop(_GUIDANCE, None)
    for layer in sorted(own.keys() ^ theirs.keys()):
        what = f"lacks the layer {layer}" if layer in own else f"has the layer {layer}, which the teacher's has not"
        raise BadInput(f"{name}: {what}; expected a UNet of the teacher's architecture")
    for layer, shape in theirs.items():
        if shape != own[layer]:
            raise BadInput(f"{name}: its {layer} is {times(shape)}, the teacher's {times(own[layer])}; expected a UNet of its architecture")
    config = read_config(base, "unet")
    for key in _SHAPELESS:
        if key in checkpoint.unet_config and key in config and checkpoint.unet_config[key] != config[key]:
            raise BadInput(f"{name}: its {key} is {checkpoint.unet_config[key]!r}; expected the teacher's, {config[key]!r}")


def load_checkpoint(checkpoint: Checkpoint, pipeline: TeacherPipeline, field: str) -> Any:
    """A UNet in evaluation mode, on the pipeline's device and in its type: a copy of the pipeline's with the checkpoint's weights, or with its LoRA
    as an adapter, put on by diffusers' own loader. Raises `BadInput`, naming `field`, for what that loader refuses."""
    unet = copy.deepcopy(pipeline.unet)
    name = f"{field} {checkpoint.files[0].name}"
    try:
        if checkpoint.kind == "unet":
            if checkpoint.takes_guidance:
                add_guidance_input(unet)
            unet.load_state_dict({layer: tensor for file in checkpoint.files for layer, tensor in load_file(file).items()})
        else:
            plain = pipeline.diffusers()
            shared = type(plain)(**{**plain.components, "unet": unet}, **_without_checker(plain))
            shared.load_lora_weights(str(checkpoint.files[0].parent), weight_name=checkpoint.files[0].name)
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise BadInput(f"{name}: cannot be put on the teacher ({str(error).strip().splitlines()[0]}); {EXPECTED}") from error
    return unet.to(pipeline.device).eval()


def _of_file(path: Path, field: str) -> Checkpoint:
    if path.suffix != ".safetensors":
        raise BadInput(f"{field} {path.name}: pickled weights can run code when they are read; {EXPECTED}")
    names = read_header(path).keys()
    if any("lora" in name for name in names):
        return Checkpoint("lora", (path,))
    if "conv_in.weight" in names:
        return Checkpoint("unet", (path,))
    original = any(name.startswith("model.diffusion_model.") for name in names)
    what = "has the names of the original code (a single-file checkpoint)" if original else "holds neither a LoRA nor a UNet"
    raise BadInput(f"{field} {path.name}: {what}; {EXPECTED}")


def _variant(folder: Path) -> str | None:
    plain = any((folder / f"{stem}{end}").is_file() for stem in STEMS for end in (".safetensors", ".safetensors.index.json"))
    return None if plain or not any(folder.glob("*.fp16*.safetensors")) else "fp16"


def _shapes(files: tuple[Path, ...]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(entry["shape"]) for file in files for name, entry in read_header(file).items()}


def _without_checker(plain: Any) -> dict[str, Any]:
    return {"requires_safety_checker": False} if "safety_checker" in plain.components else {}
