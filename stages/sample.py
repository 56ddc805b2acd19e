"""One picture from a published model, by plain diffusers calls: the function behind `distill sample`."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError

from infra.store import ArtifactStore
from infra.torchvision_ops import define_missing_ops
from schemas.errors import BadInput

define_missing_ops()

import diffusers  # noqa: E402
from pydantic import ValidationError  # noqa: E402

from stages.publish.variants import COMPOSITION, DESCRIPTION, TEACHER, Composition, Description  # noqa: E402

logger = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"


@contextmanager
def _loading(what: str) -> Iterator[None]:
    """Turn diffusers' refusal of files that are missing or cut short, or of a hub out of reach, into `BadInput`."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{what}: cannot be loaded ({first_line}); expected a whole model as the stage publish made it") from error


def open_published(reference: str, store: ArtifactStore | None = None) -> Path:
    """Return the folder of a published model: a folder itself, or an artifact on the store by identity, short identity or address.

    Raises `BadInput` when it is neither, or an artifact of another kind.
    """
    folder = Path(reference.removeprefix("file://")).expanduser()
    if folder.is_dir() and (store is None or (folder / DESCRIPTION).exists()):
        return folder
    if store is None:
        raise BadInput(f"{reference}: no such folder; expected a published model, or an artifact reference and a store")
    try:
        manifest = store.resolve(reference)
    except BadInput as error:
        raise BadInput(f"{reference}: no such folder here; {error}") from error
    if manifest.kind != "published_model":
        raise BadInput(f"{reference}: is an artifact of the kind {manifest.kind}, expected published_model")
    return store.fetch(manifest)


def read_description(folder: Path) -> Description:
    """Read `distillery.json` of a published model. Raises `BadInput` when there is none of this version."""
    path = folder / DESCRIPTION
    try:
        return Description.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); expected a folder made by the stage publish") from error
    except ValidationError as error:
        raise BadInput(f"{path}: not a description of this version ({error.error_count()} mistakes)") from error


def read_composition(folder: Path) -> Composition:
    """Read `composition.json` of a composed model. Raises `BadInput` when there is none of this version."""
    path = folder / COMPOSITION
    try:
        return Composition.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise BadInput(f"{path}: cannot be read; expected what distill compose has written") from error


def set_adapters(pipeline: Any, folder: Path, composition: Composition) -> None:
    """Put the LoRAs in `folder`, kept apart in files of their adapters' names, on a pipeline. Raises `BadInput` when one cannot be loaded."""
    weights = {ingredient.adapter: ingredient.weight for ingredient in composition.ingredients}
    for adapter in weights:
        with _loading(f"{folder}/{adapter}.safetensors"):
            pipeline.load_lora_weights(str(folder), weight_name=f"{adapter}.safetensors", adapter_name=adapter)
    pipeline.set_adapters(list(weights), adapter_weights=list(weights.values()))


def sample(
    published: Path,
    prompt: str,
    *,
    steps: int,
    seed: int = 0,
    variant: str | None = None,
    guidance_scale: float | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Image.Image:
    """Draw `prompt` in `steps` steps with the variant made for that many: the picture that the model card's own code gives for the seed.

    `variant` chooses among several, `teacher` the pipeline at the root, which takes any step count and is taken where there is no variant at all.
    `guidance_scale` (Imagen convention) takes the place of the variant's own. Raises `BadInput` with the variants there are when none fits, and for a
    scale outside the range of a variant that is told it.
    """
    description = read_description(published)
    networks: dict[str, Any] = {}
    if variant == TEACHER or (variant is None and not description.variants):
        if not description.complete:
            raise BadInput(
                f"{description.name}: the teacher's pipeline is not in it; expected a variant: {', '.join(description.variants)}"
            )
        name, scheduler, own_scale = TEACHER, description.teacher.scheduler, description.teacher.guidance_scale
        pipeline = _pipeline(description, published, dtype)
    else:
        name, chosen = description.choose(steps, variant)
        scheduler, own_scale = chosen.scheduler, chosen.guidance_scale
        bounds = chosen.guidance_range
        if guidance_scale is not None and bounds is not None and not bounds[0] <= guidance_scale <= bounds[1]:
            raise BadInput(f"guidance_scale: {guidance_scale:g} with {name}; expected {bounds[0]:g} to {bounds[1]:g}, as it was trained")
        if chosen.kind == "unet":
            unet_class: Any = diffusers.UNet2DConditionModel
            with _loading(f"{published}/{name}/unet"):
                networks["unet"] = unet_class.from_pretrained(published, subfolder=f"{name}/unet", torch_dtype=dtype, use_safetensors=True)
        pipeline = _pipeline(description, published, dtype, **networks)
        if chosen.kind == "lora":
            with _loading(f"{published}/{name}/{LORA_FILE}"):
                pipeline.load_lora_weights(str(published), subfolder=name, weight_name=LORA_FILE)
        elif chosen.kind == "adapters":
            set_adapters(pipeline, published / name, read_composition(published))
    logger.info("%s: %s, %d steps", description.name, name, steps)
    with _loading(f"{published}/{name}/scheduler"):
        pipeline.scheduler = getattr(diffusers, scheduler).from_pretrained(published, subfolder=f"{name}/scheduler")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    scale = own_scale if guidance_scale is None else guidance_scale
    drawn: Image.Image = pipeline.to(device)(prompt, num_inference_steps=steps, guidance_scale=scale, generator=generator).images[0]
    return drawn


def _pipeline(description: Description, published: Path, dtype: torch.dtype, **networks: Any) -> Any:
    """The teacher's pipeline: at the root, or that of the base model."""
    base = published if description.complete else description.base_model
    with _loading(f"{base}" if description.complete else f"base model {base} of {description.name}"):
        return getattr(diffusers, description.pipeline).from_pretrained(base, torch_dtype=dtype, use_safetensors=True, **networks)
