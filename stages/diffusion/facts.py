"""What a pipeline folder is, found from its configuration files and the headers of its weights, without loading any. Unsupported ones are named."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.errors import BadInput
from stages.diffusion.prediction import prediction_type
from stages.diffusion.schedule import NoiseSchedule
from stages.diffusion.weights import find_weights, parameter_count

MODEL_INDEX = "model_index.json"

_TEXT_ENCODERS = ("CLIPTextModel",)
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_COMMON: dict[str, tuple[str, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": _TEXT_ENCODERS,
    "tokenizer": _TOKENIZERS,
    "scheduler": (),
}
ARCHITECTURES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "StableDiffusionPipeline": _COMMON,
    "StableDiffusionXLPipeline": _COMMON | {"text_encoder_2": ("CLIPTextModelWithProjection",), "tokenizer_2": _TOKENIZERS},
}
"""Components by pipeline class, and the classes each may be. Others a pipeline may carry (safety checker, image encoder) are left behind."""

_SCHEDULERS = (
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler",
)  # fmt: skip

_UNET_DEFAULT_ONLY: Mapping[str, object] = {
    "class_embed_type": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
    "num_class_embeds": None,
}


@dataclass(frozen=True)
class TeacherFacts:
    """What later stages and people need to know of a teacher."""

    architecture: str
    """The pipeline class of diffusers."""
    prediction_type: str
    resolution: int
    """Pixels on a side that the UNet was trained for."""
    scaling_factor: float
    """Latents are the VAE's mean times this."""
    latent_shape: tuple[int, int, int]
    """(C, h, w) at `resolution`."""
    scheduler_config: Mapping[str, Any]
    parameters: Mapping[str, int]
    """Parameter count by component."""


def components(folder: Path) -> tuple[str, ...]:
    """Names of the components that make the pipeline in `folder`, sorted. Raises `BadInput` for a pipeline or component that is not supported."""
    return tuple(sorted(ARCHITECTURES[_checked_index(folder)["_class_name"]]))


def inspect(folder: Path) -> TeacherFacts:
    """Read configurations and weight headers of a pipeline folder.

    Raises `BadInput` when the pipeline, a component or one of its settings is not supported (naming it and what is), when a file is missing, when
    weights are not safetensors, and when a weights file is cut short.
    """
    index = _checked_index(folder)
    architecture = index["_class_name"]
    unet, vae = read_config(folder, "unet"), read_config(folder, "vae")
    scheduler = read_config(folder, "scheduler", "scheduler_config.json")
    _check_unet(folder, unet, vae, xl="text_encoder_2" in ARCHITECTURES[architecture])
    _check_vae(folder, vae)
    prediction = prediction_type(scheduler.get("prediction_type", "epsilon"))
    schedule = NoiseSchedule.from_scheduler_config(scheduler)
    if prediction.name == "epsilon" and not schedule.alphas_cumprod[-1] > 0:
        raise BadInput(
            f"{folder}/scheduler: rescale_betas_zero_snr with prediction_type epsilon divides by zero; expected v_prediction with it"
        )
    for tokenizer in (name for name in ARCHITECTURES[architecture] if name.startswith("tokenizer")):
        _check_tokenizer(folder, tokenizer)
    latent = unet["sample_size"]
    return TeacherFacts(
        architecture=architecture,
        prediction_type=prediction.name,
        resolution=latent * 2 ** (len(vae["block_out_channels"]) - 1),
        scaling_factor=float(vae.get("scaling_factor", 0.18215)),
        latent_shape=(unet["in_channels"], latent, latent),
        scheduler_config=scheduler,
        parameters={name: parameter_count(find_weights(folder / name)) for name in components(folder) if _has_weights(name)},
    )


def read_config(folder: Path, component: str, file: str = "config.json") -> dict[str, Any]:
    """Configuration of one component. Raises `BadInput` when it is missing or no JSON object."""
    return _read_json(folder / component / file)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: missing; expected a pipeline folder in diffusers layout") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path}: found {type(value).__name__}, expected a JSON object")
    return value


def _checked_index(folder: Path) -> dict[str, Any]:
    index = _read_json(folder / MODEL_INDEX)
    name = str(index.get("_class_name"))
    if name not in ARCHITECTURES:
        raise BadInput(f"{folder}: pipeline {name!r} is not supported; expected {' or '.join(ARCHITECTURES)}")
    for component, allowed in ARCHITECTURES[name].items():
        found = index.get(component)
        library, kind = found if isinstance(found, list) and len(found) == 2 else (None, None)
        if kind is None:
            raise BadInput(f"{folder}: {name} has no {component}; expected one of {', '.join(allowed or _SCHEDULERS)}")
        if library not in ("diffusers", "transformers"):
            raise BadInput(
                f"{folder}: {component} comes from {library!r}; expected diffusers or transformers, since code of a pipeline is never run"
            )
        if kind not in (allowed or _SCHEDULERS):
            raise BadInput(f"{folder}: {component} {kind!r} is not supported; expected one of {', '.join(allowed or _SCHEDULERS)}")
    if index.get("requires_aesthetics_score"):
        raise BadInput(f"{folder}: requires_aesthetics_score (a refiner) is not supported; expected a base model")
    return index


def _check_unet(folder: Path, unet: Mapping[str, Any], vae: Mapping[str, Any], xl: bool) -> None:
    def refuse(what: str, expected: str) -> BadInput:
        return BadInput(f"{folder}/unet: {what} is not supported; expected {expected}")

    for name, default in _UNET_DEFAULT_ONLY.items():
        if unet.get(name, default) != default:
            raise refuse(f"{name} {unet[name]!r}", f"{default}")
    embedding = unet.get("addition_embed_type")
    wanted = "text_time" if xl else None
    if embedding != wanted:
        raise refuse(f"addition_embed_type {embedding!r}", f"{wanted!r}")
    channels, latent = unet.get("in_channels"), vae.get("latent_channels", 4)
    if channels != latent or unet.get("out_channels") != latent:
        raise refuse(
            f"in_channels {channels}, out_channels {unet.get('out_channels')}", f"the VAE's {latent} latent channels (no inpainting model)"
        )
    if not isinstance(unet.get("sample_size"), int):
        raise refuse(f"sample_size {unet.get('sample_size')!r}", "one integer, the side of the latents")


def _check_vae(folder: Path, vae: Mapping[str, Any]) -> None:
    for name in ("shift_factor", "latents_mean", "latents_std"):
        if vae.get(name) is not None:
            raise BadInput(f"{folder}/vae: {name} is not supported; expected a VAE with scaling_factor only")
    if "block_out_channels" not in vae:
        raise BadInput(f"{folder}/vae/config.json: no block_out_channels; expected the configuration of an AutoencoderKL")


def _check_tokenizer(folder: Path, name: str) -> None:
    if not (folder / name / "tokenizer.json").is_file() and not all(
        (folder / name / file).is_file() for file in ("vocab.json", "merges.txt")
    ):
        raise BadInput(f"{folder / name}: no vocabulary; expected tokenizer.json, or vocab.json and merges.txt")


def _has_weights(component: str) -> bool:
    return not component.startswith(("tokenizer", "scheduler"))
