"""The variants of a published model: each student under a name, with all that a sampler must know of it."""

from collections.abc import Mapping
from typing import Any, Literal

from schemas.base import Field, Model, Sha256
from schemas.errors import BadInput
from schemas.manifest import FinetunedLoRA, Manifest, StudentLoRA, StudentManifest

DESCRIPTION = "distillery.json"
"""File at the root of a published model that names its variants."""


COMPOSITION = "composition.json"
"""File at the root of a composed model that says what it is composed of."""


class Variant(Model):
    """One student, in the subfolder of its name."""

    kind: Literal["unet", "lora", "adapters"]
    """`adapters`: several LoRAs kept apart, each in a file of its name; their weights are in `composition.json` at the root."""
    steps: tuple[int, ...]
    """Step counts it is meant for, largest first."""
    timesteps: dict[int, tuple[int, ...]]
    """The grid of each step count, descending."""
    sampler: Literal["trailing", "lcm", "lcm-trailing"]
    scheduler: str
    """Scheduler class of diffusers whose configuration lies in `scheduler/`."""
    prediction_type: str
    guidance_scale: float
    """As diffusers' pipelines take it (Imagen convention); 1 means none."""
    guidance_range: tuple[float, float] | None = None
    """Lowest and highest scale of the training, where diffusers' pipelines tell the scale to the UNet in the place of guidance. None: they do not."""
    method: str
    node: str
    """Step of the plan that made it."""
    identity: str
    """Artifact it was made from."""
    kohya: str | None = None
    """Beside a LoRA's file in diffusers layout the same in kohya's key format, which ComfyUI and A1111 read."""


class Style(Model):
    """A LoRA that changes what is drawn, in the subfolder of its name: sampled as what it is put on."""

    rank: int
    alpha: float
    samples: int
    """Pictures it was trained on."""
    training_steps: int
    identity: str
    """Artifact it was made from."""
    kohya: str
    """As of a variant."""


TEACHER = "teacher"
"""Folder with the scheduler that the teacher was measured with, and the name to sample it by."""


class TeacherSampling(Model):
    """How the pipeline at the root was sampled when it was measured."""

    scheduler: str
    """Scheduler class of diffusers whose configuration lies in `teacher/scheduler/`."""
    steps: int
    guidance_scale: float


class Ingredient(Model):
    """One LoRA of a composed model."""

    adapter: str
    """Its name in the pipeline: `acceleration`, `style`, `style-2`."""
    weight: float
    name: str
    """Of the file, or of the step of the plan that made it."""
    sha256: Sha256
    """Of the LoRA's file."""
    identity: Sha256 | None = None
    """Of the artifact it was read from."""


class Composition(Model):
    """Content of `composition.json`: theta = theta_base + sum of weight x change (LCM-LoRA, arXiv 2311.05556, 3.3)."""

    schema_version: Literal[1] = 1
    base_digest: Sha256
    """Over every file of the base's pipeline, as a teacher's weights digest."""
    ingredients: tuple[Ingredient, ...]
    """The acceleration first."""
    agreement: dict[str, float]
    """By variant how far its output is from the adapters' kept apart: the largest difference, in standard deviations of the output."""


class Description(Model):
    """Content of `distillery.json`."""

    schema_version: Literal[1] = 1
    name: str
    pipeline: str
    """Pipeline class of diffusers."""
    resolution: int
    """Pixels on a side."""
    complete: bool
    """Whether the teacher's pipeline lies at the root; otherwise the variants need `base_model`."""
    base_model: str | None = None
    teacher: TeacherSampling
    variants: dict[str, Variant] = Field(default_factory=dict)
    styles: dict[str, Style] = Field(default_factory=dict)

    @property
    def kohya(self) -> dict[str, str]:
        """By variant or style the path of its LoRA in kohya's key format."""
        named = {name: variant.kohya for name, variant in self.variants.items()} | {
            name: style.kohya for name, style in self.styles.items()
        }
        return {name: f"{name}/{file}" for name, file in named.items() if file is not None}

    def choose(self, steps: int, name: str | None = None) -> tuple[str, Variant]:
        """Return the variant of that name, or the only one for that step count. Raises `BadInput` with those there are."""
        offered = "; ".join(f"{known} ({'/'.join(map(str, variant.steps))} steps)" for known, variant in self.variants.items()) or "none"
        if name is not None and name not in self.variants:
            raise BadInput(f"variant {name!r}: not in {self.name}; expected one of {offered}")
        matches = {known: variant for known, variant in self.variants.items() if steps in variant.steps and (name is None or name == known)}
        if not matches:
            raise BadInput(f"steps {steps}: {name or self.name} has no variant for it; expected one of {offered}")
        if len(matches) > 1:
            raise BadInput(f"steps {steps}: {self.name} has several variants for it, name one: expected variant {' or '.join(matches)}")
        return next(iter(matches.items()))


def variant_names(students: Mapping[str, StudentManifest]) -> dict[str, str]:
    """By node name the variant's: `lightning-4step`, `lightning-4step-lora`, `lcm-lora`; followed by the node's where two would be one."""
    names = {node: _name(manifest) for node, manifest in students.items()}
    taken = list(names.values())
    return {node: f"{name}-{node}" if taken.count(name) > 1 else name for node, name in names.items()}


def _name(manifest: StudentManifest) -> str:
    content = manifest.content
    steps = f"-{content.steps[0]}step" if len(content.steps) == 1 else ""
    return manifest.lineage.stage + steps + ("-lora" if isinstance(content, StudentLoRA) else "")


def variant_of(manifest: StudentManifest, scheduler: Any, kohya: str | None) -> Variant:
    """Describe a student, the scheduler it is published with, and the name of its file in kohya's key format."""
    content = manifest.content
    return Variant(
        kind="lora" if isinstance(content, StudentLoRA) else "unet",
        steps=content.steps,
        timesteps=content.timesteps,
        sampler=content.sampler,
        scheduler=type(scheduler).__name__,
        prediction_type=content.prediction_type,
        guidance_scale=content.guidance_scale,
        guidance_range=content.guidance_range,
        method=content.method,
        node=manifest.lineage.node,
        identity=manifest.identity,
        kohya=kohya,
    )


def style_of(manifest: Manifest[FinetunedLoRA], kohya: str) -> Style:
    """Describe a style LoRA, and the name of its file in kohya's key format."""
    content = manifest.content
    return Style(
        rank=content.rank,
        alpha=content.alpha,
        samples=content.samples,
        training_steps=content.training_steps,
        identity=manifest.identity,
        kohya=kohya,
    )
