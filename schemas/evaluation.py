"""Recipe sections that measure and hand out: `evaluate`, `publish`."""

from collections.abc import Iterator
from typing import Annotated, Literal

from schemas.base import Field, Mistake, Model, NotIdentity
from schemas.training import PositiveInt


class EvaluateConfig(Model):
    """`evaluate`: teacher and students on the same prompts and seeds, with FID, grids and a report."""

    prompts: Annotated[str | None, NotIdentity] = None
    """Text file, one prompt a line. null: captions of the encoded set, in the order of the seed. Its content is part of the identity."""
    prompt_count: Annotated[int, Field(ge=2)] = 10_000
    """Prompts of a row of the table. SDXL-Lightning 4.3: 10K, one image each. Where fewer exist they are repeated, with other noise."""
    images_per_prompt: PositiveInt = 1
    teacher_steps: tuple[PositiveInt, ...] = (32, 8, 4, 2, 1)
    """Step counts the teacher is sampled with; the first, on other noise, is also the reference of the FID against the teacher."""
    teacher_guidance_scale: Annotated[float, Field(ge=1)] = 7.0
    """Imagen-convention scale of the teacher's rows."""
    extractor: Literal["inception", "efficientnet-lite0"] = "inception"
    """Feature network of the FID. `inception`: clean-fid's own, downloaded at first use. `efficientnet-lite0`: carried by a package."""
    grid_prompts: Annotated[int, Field(ge=1, le=64)] = 8
    """Prompts shown in the grid."""
    batch_size: PositiveInt = 8
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Seed of prompts and starting noise. null: the recipe's."""


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
