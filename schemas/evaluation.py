"""Recipe sections that measure and hand out: `evaluate`, `publish`."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import model_validator

from schemas.also import TEACHERS, AlsoConfig
from schemas.base import Field, Mistake, Model, NotIdentity
from schemas.extractors import Extractor, weights_fit_extractor
from schemas.finetune import finetune_named
from schemas.protocols import PATCH_PX, PROTOCOLS, MetricGroup, Protocol
from schemas.training import PositiveInt


class TransferConfig(Model):
    """An entry of `evaluate.transfer`: another teacher that the LoRAs are put on, or pictures of another shape or begun from others, that every
    student draws; measured against that teacher's own samples."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")]
    """Lower case, digits, dashes."""
    base: Annotated[str | None, NotIdentity] = None
    """Pipeline folder in diffusers layout, or address of one, of the teacher's architecture; or `finetune-NAME`, a base that the recipe makes. null:
    the teacher. Identity has its content."""
    style: Annotated[str | None, NotIdentity] = None
    """LoRA file or folder in diffusers layout, or `finetune-NAME`, a style that the recipe makes: added to the base's weights. Identity has its
    content."""
    style_weight: float = 0.8
    """LCM-LoRA, arXiv 2311.05556, 3.3."""
    size_px: tuple[PositiveInt, PositiveInt] | None = None
    """Height and width of the pictures, such as `[1344, 768]`: another aspect ratio. null: the base's resolution, square."""
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    """Image-to-image (SDEdit, arXiv 2108.01073): sampling starts from a noised picture of the encoded set, one of the prompt's caption where there is
    one, and takes the last `strength` of each grid's steps, rounded down as diffusers does; step counts of which none is left have no row. null: from
    noise alone."""

    controlnet: Annotated[str | None, NotIdentity] = None
    """Folder of a ControlNet in diffusers layout, of the teacher's architecture (arXiv 2302.05543): every row is drawn with it, on the edges of
    pictures of the encoded set, chosen as for `strength`. Identity has its content. null: none."""
    controlnet_scale: Annotated[float, Field(gt=0)] = 1.0
    """What the ControlNet's residuals are multiplied by."""
    guidance_scale: Annotated[float, Field(ge=1)] | None = None
    """Imagen-convention scale of the students' rows: some on top of what an acceleration LoRA has learnt of its own base's. Students that are told a
    scale keep theirs. null: as each is published, without."""
    teacher_guidance_scale: Annotated[float, Field(ge=1)] | None = None
    """Of the changed teacher's rows and reference. null: as in the table."""

    def outside_name(self, field: str) -> str:
        """The name by which the plan and the stage know what lies outside, as in the recipe."""
        return f"transfer.{self.name}.{field}"

    def _changes(self) -> dict[str, str]:
        return {field: place for field, place in (("base", self.base), ("style", self.style)) if place is not None}

    def outside_fields(self) -> dict[str, str]:
        """Addresses of what lies outside, by field."""
        places = {field: place for field, place in self._changes().items() if finetune_named(place) is None}
        return places if self.controlnet is None else places | {"controlnet": self.controlnet}

    def outside(self) -> dict[str, str]:
        """Addresses of what lies outside, by name."""
        return {self.outside_name(field): place for field, place in self.outside_fields().items()}

    def finetuned(self) -> dict[str, str]:
        """Runs of `finetune` that base and style come from, by field."""
        return {field: place for field, place in self._changes().items() if finetune_named(place) is not None}

    def identity_fields(self) -> dict[str, Any]:
        """As of any model, and which runs of `finetune` are read."""
        return super().identity_fields() | self.finetuned()

    def describe(self) -> str:
        """What is changed: runs by name, and no places."""
        made = self.finetuned()
        base = "the teacher" if self.base is None else f"the base {made['base']}" if "base" in made else "another base"
        style = "" if self.style is None else f" with {made.get('style', 'a style')} at {self.style_weight:g}"
        size = "" if self.size_px is None else f" at {self.size_px[0]} x {self.size_px[1]} px"
        control = "" if self.controlnet is None else f" with a ControlNet at {self.controlnet_scale:g}"
        pictures = "" if self.strength is None else f", from pictures at strength {self.strength:g}"
        scales = {"it": self.teacher_guidance_scale, "students": self.guidance_scale}
        guided = "".join(f", {who} with guidance {scale:g}" for who, scale in scales.items() if scale is not None)
        return base + style + control + size + pictures + guided

    @property
    def of_teacher(self) -> bool:
        """Whether the teacher's weights stay as they are, so that students with weights of their own take part."""
        return self.base is None and self.style is None

    @property
    def reads_pictures(self) -> bool:
        """Whether its rows need pictures of the encoded set."""
        return self.strength is not None or self.controlnet is not None


def _something_changes(config: TransferConfig) -> Iterator[Mistake]:
    if config.of_teacher and config.size_px is None and not config.reads_pictures:
        yield ("base",), None, "an entry without base, style, size_px, strength and controlnet is the teacher itself: expected one of them"


def _pictures_are_the_teachers(config: TransferConfig) -> Iterator[Mistake]:
    if not config.reads_pictures:
        return
    beside = "strength" if config.strength is not None else "controlnet"
    if config.size_px is not None:
        yield ("size_px",), list(config.size_px), f"encoded pictures are of the size they were encoded at: expected null beside {beside}"
    if "base" in config.outside_fields():
        expected = f"encoded pictures are of the teacher's VAE: expected null, or a run of finetune, beside {beside}"
        yield ("base",), config.base, expected


TransferConfig.cross_checks = (_something_changes, _pictures_are_the_teachers)


class ReferenceConfig(Model):
    """`reference`: features of real images from elsewhere, such as COCO's, an artifact of its own that every evaluation with these settings shares.
    Made from the fields of `evaluate` that have these names."""

    extractor: Extractor
    resize_px: PositiveInt | None
    patch_px: PositiveInt | None
    """null: no patches."""


class PerceptualConfig(Model):
    """`evaluate.perceptual`: how the metrics `lpips` and `diversity` compare two pictures."""

    distance: Literal["lpips", "lpips-efficientnet-lite0"] = "lpips"
    """`lpips`: with VGG-16 (arXiv 1801.03924). `lpips-efficientnet-lite0`: the same form, its heads all one, with the network that a package
    carries."""
    vgg: Annotated[str | None, NotIdentity] = None
    """File with torchvision's VGG-16 weights (.pth or .safetensors), for `lpips`. Identity has its content. null: torchvision downloads them."""
    size_px: PositiveInt | None = None
    """Side that pictures are resized to, bilinearly, before they are compared. null: as they are."""


class EvaluateConfig(Model):
    """`evaluate`: teacher and students on the same prompts and seeds, with FID and other metrics, grids and a report."""

    protocol: Protocol | None = None
    """Published evaluation whose settings take the place of the defaults below; what the recipe names itself stands."""
    prompts: Annotated[str | None, NotIdentity] = None
    """Text file, one prompt a line. null: captions of the encoded set, in the order of the seed. Its content is part of the identity."""
    prompt_count: Annotated[int, Field(ge=2)] = 10_000
    """Prompts of a row of the table. SDXL-Lightning 4.3: 10K, one image each. Where fewer exist they are repeated, with other noise."""
    images_per_prompt: PositiveInt = 1
    teacher_steps: tuple[PositiveInt, ...] = (32, 8, 4, 2, 1)
    """Step counts the teacher is sampled with; the first, on other noise, is also the reference of the FID against the teacher."""
    teacher_guidance_scale: Annotated[float, Field(ge=1)] = 7.0
    """Imagen-convention scale of the teacher's rows."""
    extractor: Extractor = "inception"
    """Feature network of the FID. `inception`: clean-fid's own. `efficientnet-lite0`: ImageNet's, carried by a package. `transformers`: any image
    model in transformers' layout, such as DINOv2 or CLIP, by `extractor_weights`: its pooled features."""
    extractor_weights: Annotated[str | None, NotIdentity] = None
    """For `inception` the file `inception-2015-12-05.pt`, or a folder with it; null: clean-fid downloads it at first use. For `transformers` a
    folder, address or hub id of a model with safetensors. Identity has their content."""
    metrics: tuple[MetricGroup, ...] = ("fid",)
    """What is measured, against real images and against other samples of the teacher: FID; `patch_fid` of a crop of the centre; KID; precision and
    recall; density and coverage. `clip_score`: pictures against their prompts, by `clip_model`. `lpips`: pictures against the reference's of the same
    prompt and noise; `diversity`: those of one prompt against each other; both by `perceptual`."""
    resize_px: PositiveInt | None = None
    """Side of the squares, cropped from the centre and resized by Lanczos, that are shown to the feature network. null: the teacher's resolution."""
    reference: Annotated[str | None, NotIdentity] = None
    """Folder, or address of one, of the real images that are compared with: PNG, JPEG or WebP, in folders below it too. Identity has their content.
    null: the selection's pictures."""
    patch_px: PositiveInt = PATCH_PX
    """Side of the crop of `patch_fid`, from the picture as it is. SDXL-Lightning 4.3: 299, what Inception takes."""
    clip_model: Annotated[str | None, NotIdentity] = None
    """CLIP model in transformers' layout: folder, address or hub id. Identity has its content."""
    clip_prefix: str = ""
    """Text before every prompt for the CLIP score, with its space."""
    perceptual: PerceptualConfig = PerceptualConfig()
    """The distance of `lpips` and `diversity`."""
    resamples: Annotated[int, Field(ge=100, le=100_000)] = 1000
    """Resamples of the bootstrap behind every interval."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Share of the resamples that an interval holds."""
    timing: PositiveInt | None = None
    """Repeats of the timing of every row: latency, throughput, peak memory. null: none. Such a report has other figures each time it is made."""
    grid_prompts: Annotated[int, Field(ge=1, le=64)] = 8
    """Prompts shown in the grid."""
    batch_size: PositiveInt = 8
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Seed of prompts and starting noise. null: the recipe's."""
    transfer: tuple[TransferConfig, ...] = ()
    """Other bases and styles that the LoRAs among the students are measured on."""
    also: tuple[AlsoConfig, ...] = ()
    """Published checkpoints, by path, that have rows beside the students."""

    def reference_config(self) -> ReferenceConfig:
        """How pictures are shown to the feature network."""
        patch_px = self.patch_px if "patch_fid" in self.metrics else None
        return ReferenceConfig(extractor=self.extractor, resize_px=self.resize_px, patch_px=patch_px)

    @model_validator(mode="before")
    @classmethod
    def _protocol_fills_in(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or not isinstance(data.get("protocol"), str):
            return data
        return {**PROTOCOLS.get(data["protocol"], {}), **data}

    def identity_fields(self) -> dict[str, Any]:
        """As of any model; an evaluation without transfer or also is the one it was before there was such a field."""
        fields = super().identity_fields()
        return {name: value for name, value in fields.items() if value or name not in ("transfer", "also")}


def _entries_have_names_of_their_own(config: EvaluateConfig) -> Iterator[Mistake]:
    for field, entries in (("transfer", config.transfer), ("also", config.also)):
        names = [entry.name for entry in entries]
        for number, name in enumerate(names):
            if name in names[:number]:
                yield (field, number, "name"), name, "an entry before it has this name: expected another"
    for number, also in enumerate(config.also):
        if also.name in TEACHERS:
            yield ("also", number, "name"), also.name, "rows of the teacher have this name: expected another"


PERCEPTUAL: Final = frozenset({"lpips", "diversity"})
"""Metrics that `evaluate.perceptual` is for."""


def _metrics_can_be_computed(config: EvaluateConfig) -> Iterator[Mistake]:
    if "fid" not in config.metrics:
        yield ("metrics",), list(config.metrics), "expected fid among them: the report ranks rows by it"
    if len(set(config.metrics)) < len(config.metrics):
        yield ("metrics",), list(config.metrics), "expected each of them once"
    if "clip_score" in config.metrics and config.clip_model is None:
        yield ("clip_model",), None, "metrics has clip_score: expected a folder, address or hub id of a CLIP model"
    if "diversity" in config.metrics and config.images_per_prompt < 2:
        yield ("images_per_prompt",), config.images_per_prompt, "metrics has diversity: expected at least 2"


EvaluateConfig.cross_checks = (_entries_have_names_of_their_own, _metrics_can_be_computed, weights_fit_extractor)


class PublishConfig(Model):
    """`publish`: a folder that plain diffusers calls load, with its model card."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]
    licence: str = "other"
    """Licence identifier of the hub for the card, such as `openrail++`. The student inherits the teacher's terms."""
    base_model: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")] | None = None
    """Hub id of the teacher for the card's metadata, such as `stabilityai/stable-diffusion-xl-base-1.0`."""
    include_pipeline: bool = True
    """Whether the teacher's VAE, text encoders and tokenizers are copied beside the students, so that the folder needs nothing else."""
    destination: Annotated[str | None, NotIdentity] = None
    """Folder to export the published model to, beside the artifact on the store."""


def _students_have_a_base(config: PublishConfig) -> Iterator[Mistake]:
    if not config.include_pipeline and config.base_model is None:
        yield ("base_model",), None, "without the teacher's pipeline (include_pipeline: false) expected the hub id of one to load"


PublishConfig.cross_checks = (_students_have_a_base,)
