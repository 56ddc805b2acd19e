"""Recipe section of `finetune`: plain diffusion training of the teacher's UNet, to a style LoRA or to another base."""

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from schemas.base import Field, Mistake
from schemas.training import OptimizerConfig, PositiveInt, TrainingConfig

_NAME = r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$"
FinetuneName = Annotated[str, Field(pattern=_NAME)]
"""Lower case, digits, dashes: `style` is the run `finetune-style`."""


_RUN = "finetune-"


def finetune_run(name: str) -> str:
    """What the run of an entry is called in a plan."""
    return f"{_RUN}{name}"


def finetune_named(address: str | None) -> str | None:
    """The entry of `finetune` that `finetune-NAME` means in the place of an address; None for addresses, such as `./finetune-old`."""
    name = (address or "").removeprefix(_RUN)
    return name if name != address and re.fullmatch(_NAME, name) else None


class FinetuneConfig(TrainingConfig):
    """One entry of `finetune`: the teacher goes on learning what it was trained for, on the encoded set or a part of it."""

    network: Literal["lora", "unet"] = "lora"
    """`lora`: an adapter that plain pipelines load. `unet`: all weights; the artifact is a complete teacher with the new UNet."""
    captions: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    """Regular expression (Python's) that is searched for in each caption, case ignored: only pictures whose caption has it are trained on. null: all.
    For pictures of another table: `distill stage finetune-NAME RECIPE --input latents=ARTIFACT`, a set that the same teacher encoded."""
    lora_rank: PositiveInt = 16
    lora_alpha: Annotated[float, Field(gt=0)] = 16
    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of samples trained with the unconditional embedding, so that guidance goes on to work (arXiv 2207.12598)."""
    snr_gamma: Annotated[float, Field(gt=0)] | None = None
    """Min-SNR loss weighting (arXiv 2303.09556; 5 there). null: unweighted."""
    training_steps: PositiveInt = 1000
    batch_size: PositiveInt = 8
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    optimizer: OptimizerConfig = OptimizerConfig(name="adamw", learning_rate=1e-4, weight_decay=1e-2)
    """diffusers' LoRA scripts. All weights of a UNet want a smaller rate: 1e-5 in diffusers' script."""


def _captions_compile(config: FinetuneConfig) -> Iterator[Mistake]:
    try:
        re.compile(config.captions or "")
    except (re.error, OverflowError, RecursionError) as error:
        yield ("captions",), config.captions, f"expected a regular expression ({error})"


FinetuneConfig.cross_checks = (_captions_compile,)
