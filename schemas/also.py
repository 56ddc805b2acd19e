"""`evaluate.also`: published checkpoints measured beside the recipe's students, and what a file's name tells of how it is sampled."""

import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Final, Literal

from schemas.base import Field, Model, NotIdentity
from schemas.training import PositiveInt

SamplerName = Literal["trailing", "lcm", "lcm-trailing"]
"""As of a student's manifest."""
PredictionName = Literal["epsilon", "v_prediction", "sample"]


class Told(Model):
    """What a name says; None for what it does not."""

    steps: tuple[PositiveInt, ...] | None = None
    sampler: SamplerName | None = None
    prediction_type: PredictionName | None = None
    start: Annotated[int, Field(ge=0)] | None = None
    """The one timestep of a single step that is not at T - 1."""


class AlsoConfig(Model):
    """An entry of `evaluate.also`: a LoRA or a UNet from elsewhere, such as SDXL-Lightning's or LCM-LoRA's, put on the recipe's teacher and sampled
    with the same prompts and noise as every row. What is left null is told by the configuration beside the weights, or by the file's name."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
    """Of its rows: lower case, digits, dashes."""
    path: Annotated[str, NotIdentity]
    """LoRA or UNet, a safetensors file or a folder in diffusers layout, a whole pipeline's folder (of which only the UNet is read), an address or a
    hub id. Identity has the content, and what the name tells."""
    steps: tuple[PositiveInt, ...] | None = None
    """Step counts, a row each."""
    sampler: SamplerName | None = None
    """`trailing`: Euler on the trailing grid; `lcm`: LCMScheduler; `lcm-trailing`: the same on the trailing grid."""
    prediction_type: PredictionName | None = None
    """What the network predicts. Where nothing tells it is the teacher's."""
    guidance_scale: Annotated[float, Field(ge=1)] | None = None
    """Imagen-convention scale; 1 is none, the default. Of a UNet that is told the scale it is what it is told, by default 8 (LCM, arXiv 2310.04378,
    table 1)."""

    @property
    def outside_name(self) -> str:
        """The name by which the plan and the stage know its content."""
        return f"also.{self.name}"

    @property
    def told(self) -> Told:
        """What the name of the file or folder says."""
        return told_by_name(self.path)

    def identity_fields(self) -> dict[str, Any]:
        """As of any model, and what the name tells: a file of another name may be sampled in another way."""
        return super().identity_fields() | {"told": self.told.identity_fields()}


TEACHERS: Final = ("teacher", "reference")
"""Names of the teacher's own rows."""

_PLAIN: Final = re.compile(r"pytorch_lora_weights|diffusion_pytorch_model(\.fp16)?|unet|model")
"""Names that diffusers gives to every file or folder of a kind: what tells is the folder they lie in."""

_STEPS: Final = re.compile(r"(?<!\d)(\d{1,2})[-_ ]?steps?")

_FAMILIES: Final[tuple[tuple[str, SamplerName, tuple[int, ...] | None], ...]] = (
    ("lightning", "trailing", None),
    ("dmd", "lcm-trailing", (4,)),
    ("lcm", "lcm", (8, 4, 2, 1)),
    ("turbo", "trailing", (4, 2, 1)),
)
"""What a name holds, the sampler of the public release, and its step counts where the name has none. SDXL-Lightning (arXiv 2402.13929, 3.5), DMD2
(arXiv 2405.14867, 4.4), LCM-LoRA (arXiv 2311.05556), SDXL-Turbo (arXiv 2311.17042)."""

_DMD_ONE_STEP: Final = 399
"""Timestep that the public one-step DMD2 of SDXL is asked at."""


def told_by_name(path: str) -> Told:
    """Read the name of a file, a folder or a hub id: `sdxl_lightning_1step_unet_x0.safetensors` takes one step and predicts the sample."""
    parts = [part for part in PurePosixPath(path.rpartition("://")[2].partition("@")[0]).parts if part != "/"]
    stems = [part.removesuffix(".safetensors").lower() for part in parts[-2:]]
    name = stems[-1] if stems and not (_PLAIN.fullmatch(stems[-1]) and len(stems) > 1) else "".join(stems[:1])
    found = _STEPS.search(name)
    steps = None if found is None or int(found[1]) == 0 else (int(found[1]),)
    prediction: PredictionName | None = "sample" if re.search(r"(?<![a-z0-9])x0(?![a-z0-9])", name.replace("_", "-")) else None
    for family, sampler, counts in _FAMILIES:
        if family in name:
            start = _DMD_ONE_STEP if family == "dmd" and steps == (1,) else None
            return Told(steps=steps or counts, sampler=sampler, prediction_type=prediction, start=start)
    return Told(steps=steps, prediction_type=prediction)
