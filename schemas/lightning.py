"""Recipe section of `lightning`: progressive distillation along a nested chain of step counts (SDXL-Lightning, arXiv 2402.13929)."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Annotated, Literal

from schemas.base import Field, Mistake, Model
from schemas.training import OptimizerConfig, PositiveInt, TrainingConfig

TRAIN_TIMESTEPS = 1000
"""T of every UNet teacher of this family; a paper's timestep T is index T - 1."""


def trailing_timesteps(steps: int, train_timesteps: int = TRAIN_TIMESTEPS) -> tuple[int, ...]:
    """Timesteps of the trailing grid, descending from T - 1: round(T - i T / N) - 1 (SDXL-Lightning 3.5).

    The rounding is half-to-even, as numpy's and so diffusers' is.
    """
    return tuple(round(train_timesteps - i * train_timesteps / steps) - 1 for i in range(steps))


class AdversarialConfig(Model):
    """The discriminator of one sub-stage (SDXL-Lightning 3.2 to 3.4, 3.7)."""

    conditional: bool = True
    """Whether the discriminator sees x_t too (eq. 22), which keeps the teacher's flow; without (eq. 23) modes are covered more freely."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6, betas=(0.0, 0.99))
    """Of the discriminator; the same as the student's in SDXL-Lightning 3.6."""
    renoise_timesteps: tuple[Annotated[int, Field(ge=0, lt=TRAIN_TIMESTEPS)], ...] = ()
    """t*: the discriminator judges predictions of x0, noised anew to one of these (eq. 25, 26). Empty: it judges x_{t-ns} itself.
    SDXL-Lightning 3.7 for two and one step: 10, 250, 500, 750, here as indices."""
    renoise_weights: tuple[Annotated[float, Field(gt=0)], ...] = (1, 1, 1, 1)
    """How often each t* is drawn, relative. SDXL-Lightning 3.7."""
    late_renoise_weights: tuple[Annotated[float, Field(gt=0)], ...] = (5, 1, 1, 1)
    """The same in the last part of the training. SDXL-Lightning 3.7; when to change is not published."""
    late_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the training, at its end, in which the late weights hold."""


class LinkConfig(TrainingConfig):
    """One link of the chain: a student of `steps` steps learns from a teacher of `teacher_steps` steps. The identity of one stage run."""

    teacher_steps: PositiveInt
    steps: PositiveInt
    guidance_scale: float = 1.0
    """Imagen-convention scale uncond + s (cond - uncond) of the teacher's calls; 1: unguided, as on all links but the first."""
    network: Literal["unet", "lora"] = "unet"
    lora_rank: PositiveInt = 64
    lora_alpha: Annotated[float, Field(gt=0)] = 64
    prediction: Literal["teacher", "sample"] = "teacher"
    """`sample`: the student is switched to predict x0 (SDXL-Lightning 3.7.3), by `conversion_steps` of eq. 27-29 first."""
    conversion_steps: Annotated[int, Field(ge=0)] = 0
    optimizer: OptimizerConfig
    start_timesteps: tuple[Annotated[int, Field(ge=0, lt=TRAIN_TIMESTEPS)], ...] | None = None
    """Timesteps the student is trained at, as long a jump from each, clamped at the clean state. null: its own grid.
    SDXL-Lightning 3.7 for two and one step: 249, 499, 749, 999."""
    adversarial: AdversarialConfig | None = None
    """The objective of 3.2. null: mean squared error."""


class LinkOverride(Model):
    """What one link does differently from the section."""

    training_steps: PositiveInt | None = None
    batch_size: PositiveInt | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    network: Literal["unet", "lora"] | None = None
    prediction: Literal["teacher", "sample"] | None = None
    conversion_steps: Annotated[int, Field(ge=0)] | None = None


class LightningConfig(TrainingConfig):
    """`lightning`: the chain, with settings for all links and overrides by the student's step count."""

    chain: tuple[Annotated[int, Field(ge=1, le=TRAIN_TIMESTEPS)], ...] = (128, 32, 8, 4, 2, 1)
    """Step counts, largest first; each grid must contain the next. SDXL-Lightning 3.6."""
    guidance_scale: Annotated[float, Field(ge=1)] = 6.0
    """Imagen-convention scale of the first link, absorbed by its student. SDXL-Lightning 3.6."""
    training_steps: PositiveInt = 10_000
    """Optimiser steps of each link. Not published."""
    batch_size: PositiveInt = 512
    """SDXL-Lightning 3.6."""
    network: Literal["unet", "lora"] = "unet"
    lora_rank: PositiveInt = 64
    lora_alpha: Annotated[float, Field(gt=0)] = 64
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)
    """Adam(.9, .999), 1e-5, no weight decay: SDXL-Lightning 3.6, of the MSE links."""
    links: Mapping[PositiveInt, LinkOverride] = {}
    """Overrides by the step count of the link's student."""

    def link(self, steps: int) -> LinkConfig:
        """Return the configuration of the link whose student takes `steps` steps."""
        position = self.chain.index(steps)
        override = self.links.get(steps, LinkOverride())
        changed = {name: value for name in LinkOverride.model_fields if (value := getattr(override, name)) is not None}
        learning_rate = changed.pop("learning_rate", self.optimizer.learning_rate)
        shared = {name: getattr(self, name) for name in LinkConfig.model_fields if name in LightningConfig.model_fields}
        return LinkConfig(
            **(
                shared
                | {
                    "teacher_steps": self.chain[position - 1],
                    "steps": steps,
                    "guidance_scale": self.guidance_scale if position == 1 else 1.0,
                    "optimizer": self.optimizer.model_copy(update={"learning_rate": learning_rate}),
                }
                | changed
            )
        )


def _chain_nests(config: LightningConfig) -> Iterator[Mistake]:
    if len(config.chain) < 2:
        yield ("chain",), list(config.chain), "expected at least two step counts, such as [8, 4]"
    for position, (many, few) in enumerate(pairwise(config.chain), start=1):
        if many % few or not set(trailing_timesteps(few)) < set(trailing_timesteps(many)):
            expected = f"the grid of {few} steps does not nest in that of {many}; expected a divisor of {many} below it"
            yield ("chain", position), few, expected


def _links_are_students(config: LightningConfig) -> Iterator[Mistake]:
    for steps in config.links:
        if steps not in config.chain[1:]:
            yield ("links", steps), steps, f"is no student of the chain; expected a step count among {list(config.chain[1:])}"


def _lora_keeps_the_prediction(config: LightningConfig) -> Iterator[Mistake]:
    for steps, override in config.links.items():
        if (override.network or config.network) == "lora" and override.prediction == "sample":
            expected = (
                "a LoRA cannot carry the switch to x0-prediction (SDXL-Lightning 3.6); expected network: unet where prediction is sample"
            )
            yield ("links", steps, "prediction"), override.prediction, expected


def _lora_follows_no_unet(config: LightningConfig) -> Iterator[Mistake]:
    networks = {steps: config.links.get(steps, LinkOverride()).network or config.network for steps in config.chain[1:]}
    for many, few in pairwise(config.chain[1:]):
        if (networks[many], networks[few]) == ("unet", "lora"):
            expected = (
                f"a LoRA is published relative to the base teacher and cannot start from the UNet of {many} steps; expected network: unet "
                f"for {few} steps, or network: lora for all links before it"
            )
            yield ("links", few, "network"), "lora", expected


LightningConfig.cross_checks = (_chain_nests, _links_are_students, _lora_keeps_the_prediction, _lora_follows_no_unet)
