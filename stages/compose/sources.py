"""What a composition is made of, found and held against the base before anything is loaded."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from infra.store import ArtifactStore
from schemas.errors import BadInput
from schemas.lightning import trailing_timesteps
from schemas.manifest import FinetunedLoRA, Manifest, StudentContent, StudentLoRA, StudentUNet, Teacher
from stages.diffusion.facts import MODEL_INDEX, TeacherFacts, inspect
from stages.diffusion.lora import LORA_FILE
from stages.diffusion.lora_files import check_fits, find_lora
from stages.diffusion.schedule import lcm_timesteps
from stages.evaluate.schedulers import checked_scheduler
from stages.publish.variants import DESCRIPTION, Ingredient, Variant
from stages.sample import read_description
from stages.teacher import pipeline_files, sha256

Form = Literal["lora", "unet", "adapters"]
FORMS: tuple[Form, ...] = ("lora", "unet", "adapters")
ACCELERATION = "acceleration"
STYLE = "--style"
STYLE_WEIGHT, ACCELERATION_WEIGHT = 0.8, 1.0
"""l1 and l2 of LCM-LoRA's examples (arXiv 2311.05556, 3.3)."""

Sampler = Literal["trailing", "lcm"]


@dataclass(frozen=True)
class Ask:
    """What a person asked for, as it was said: folders, files and references to artifacts."""

    base: str
    acceleration: str
    styles: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None
    """Of the acceleration first, then of the styles in order. None: 1, and 0.8 each."""
    forms: tuple[Form, ...] = ("lora",)
    sampler: Sampler | None = None
    """How an acceleration is sampled that comes without its description. None: as it says itself."""
    steps: tuple[int, ...] = ()
    """Step counts of such an acceleration."""


@dataclass(frozen=True)
class Sampling:
    """How the accelerated base is sampled."""

    method: str
    steps: tuple[int, ...]
    timesteps: dict[int, tuple[int, ...]]
    sampler: str
    prediction_type: str
    guidance_scale: float

    @classmethod
    def of(cls, known: StudentContent | Variant) -> "Sampling":
        """As a student's artifact or a published model says."""
        return cls(known.method, known.steps, dict(known.timesteps), known.sampler, known.prediction_type, known.guidance_scale)


@dataclass(frozen=True)
class Sources:
    """All that is composed; every file is there and fits."""

    base: Path
    facts: TeacherFacts
    sampling: Sampling
    scheduler: Any
    """The diffusers scheduler of `sampling`."""
    ingredients: tuple[Ingredient, ...]
    """The acceleration first."""
    files: tuple[Path, ...]
    """Of the ingredients."""

    @property
    def weights(self) -> dict[str, float]:
        """Weight by adapter name."""
        return {ingredient.adapter: ingredient.weight for ingredient in self.ingredients}


@dataclass(frozen=True)
class _Found:
    file: Path
    name: str
    identity: str | None = None
    sampling: Sampling | None = None


def find_sources(ask: Ask, store: ArtifactStore | None) -> Sources:
    """Find everything that was asked for. `store` is needed for artifacts only.

    Raises `BadInput` for what is not there, a base that is not supported, a whole UNet in a LoRA's place, a LoRA of another architecture or of
    other shapes, weights that are not as many as the LoRAs, and an acceleration of another prediction type or whose sampling nobody says.
    """
    weights = ask.weights or (ACCELERATION_WEIGHT, *(STYLE_WEIGHT for _ in ask.styles))
    if len(weights) != 1 + len(ask.styles):
        given = f"{len(weights)} for {1 + len(ask.styles)} LoRAs"
        raise BadInput(f"--weights: {given}; expected one for the acceleration, then one for each style, such as 1.0,0.8")
    base = _find_base(ask.base, store)
    facts = inspect(base)
    pipeline_files(base)
    named = [("--acceleration", ask.acceleration), *((STYLE, style) for style in ask.styles)]
    found = [_find(place, field, store) for field, place in named]
    for (field, _), one in zip(named, found, strict=True):
        check_fits(one.file, base, field)
    sampling = _sampling(found[0], ask, facts)
    grids = [sampling.timesteps[steps] for steps in sampling.steps]
    scheduler = checked_scheduler("--acceleration", sampling.sampler, facts.scheduler_config, sampling.prediction_type, grids)
    adapters = (ACCELERATION, *("style" if number == 1 else f"style-{number}" for number in range(1, len(found))))
    ingredients = tuple(
        Ingredient(adapter=adapter, weight=weight, name=one.name, sha256=sha256(one.file), identity=one.identity)
        for adapter, weight, one in zip(adapters, weights, found, strict=True)
    )
    return Sources(base, facts, sampling, scheduler, ingredients, tuple(one.file for one in found))


def _find_base(place: str, store: ArtifactStore | None) -> Path:
    path = Path(place.removeprefix("file://")).expanduser()
    if path.exists():
        if not (path / MODEL_INDEX).is_file():
            raise BadInput(f"--base {place}: no {MODEL_INDEX} in it; expected a pipeline folder in diffusers layout")
        return path
    manifest = _resolve(place, "--base", store)
    if not isinstance(manifest.content, Teacher):
        raise BadInput(f"--base {place}: is an artifact of the kind {manifest.kind}, expected teacher")
    assert store is not None, "it resolved the manifest"
    return store.fetch(manifest)


def _find(place: str, field: str, store: ArtifactStore | None) -> _Found:
    if Path(place.removeprefix("file://")).expanduser().exists():
        file = find_lora(place, field)
        return _Found(file, file.stem if file.name != LORA_FILE else file.absolute().parent.name, sampling=_published(file))
    manifest = _resolve(place, field, store)
    content = manifest.content
    if isinstance(content, StudentUNet):
        raise BadInput(
            f"{field} {place}: is a whole UNet (student_unet); expected a student_lora, for only low-rank changes can be added up"
        )
    if not isinstance(content, StudentLoRA) and not (field == STYLE and isinstance(content, FinetunedLoRA)):
        expected = "finetuned_lora or student_lora" if field == STYLE else "student_lora"
        raise BadInput(f"{field} {place}: is an artifact of the kind {manifest.kind}, expected {expected}")
    assert store is not None, "it resolved the manifest"
    sampling = Sampling.of(content) if isinstance(content, StudentLoRA) else None
    return _Found(store.fetch(manifest, [LORA_FILE]) / LORA_FILE, manifest.lineage.node, manifest.identity, sampling)


def _resolve(reference: str, field: str, store: ArtifactStore | None) -> Manifest:
    if store is None:
        raise BadInput(f"{field} {reference}: no such file or folder; expected one, or an artifact reference and a store")
    try:
        return store.resolve(reference)
    except BadInput as error:
        raise BadInput(f"{field} {reference}: no such file or folder here; {error}") from error


def _published(file: Path) -> Sampling | None:
    """How a LoRA is sampled that lies in a published model."""
    model = file.absolute().parent.parent
    if not (model / DESCRIPTION).is_file():
        return None
    variant = read_description(model).variants.get(file.absolute().parent.name)
    return None if variant is None else Sampling.of(variant)


def _sampling(acceleration: _Found, ask: Ask, facts: TeacherFacts) -> Sampling:
    known = acceleration.sampling
    if known is None:
        if ask.sampler is None or not ask.steps:
            raise BadInput(
                f"--acceleration {acceleration.name}: does not say how it is sampled; expected --sampler lcm or trailing, and --steps, "
                "or a student_lora artifact, or a LoRA inside a published model"
            )
        grid: Callable[[int], tuple[int, ...]] = trailing_timesteps if ask.sampler == "trailing" else lcm_timesteps
        steps = tuple(sorted(set(ask.steps), reverse=True))
        try:
            grids = {count: grid(count) for count in steps}
        except ValueError as error:
            raise BadInput(f"--steps: {error}") from error
        return Sampling(ask.sampler, steps, grids, ask.sampler, facts.prediction_type, 1.0)
    if ask.sampler not in (None, known.sampler) or not set(ask.steps) <= set(known.steps):
        told = f"{known.sampler} in {', '.join(map(str, known.steps))} steps"
        raise BadInput(f"--sampler, --steps: the acceleration is sampled by {told}; expected these, or neither option")
    if known.prediction_type not in (facts.prediction_type, "sample"):
        expected = f"expected one for {facts.prediction_type}, as the base predicts"
        raise BadInput(f"--acceleration {acceleration.name}: was trained for {known.prediction_type}; {expected}")
    return known


def parse_weights(text: str) -> tuple[float, ...]:
    """Read finite numbers with commas between them. Raises `BadInput`."""
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = (math.nan,)
    if not all(map(math.isfinite, weights)):
        raise BadInput(f"--weights {text}: expected numbers with commas between them, such as 1.0,0.8")
    return weights


def parse_forms(names: Sequence[str]) -> tuple[Form, ...]:
    """Read names of forms, each once. Raises `BadInput`."""
    unknown = [name for name in names if name not in FORMS]
    if unknown:
        raise BadInput(f"--form {unknown[0]}: expected one of {', '.join(FORMS)}")
    return tuple(form for form in FORMS if form in names)
