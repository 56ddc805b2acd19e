"""Recipe section of `lightning`: progressive distillation along a nested chain of step counts (SDXL-Lightning, arXiv 2402.13929)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

from schemas.adversarial import AdversarialConfig, AdversarialPlan, Phase
from schemas.base import Field, Mistake, Model
from schemas.training import OptimizerConfig, PositiveInt, TrainingConfig

TRAIN_TIMESTEPS = 1000
"""T of every UNet teacher of this family; a paper's timestep T is index T - 1."""


def trailing_timesteps(steps: int, train_timesteps: int = TRAIN_TIMESTEPS) -> tuple[int, ...]:
    """Timesteps of the trailing grid, descending from T - 1: round(T - i T / N) - 1 (SDXL-Lightning 3.5).

    The rounding is half-to-even, as numpy's and so diffusers' is.
    """
    return tuple(round(train_timesteps - i * train_timesteps / steps) - 1 for i in range(steps))


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


@dataclass(frozen=True)
class LinkRun:
    """One run of the stage: what it is called, and whose students it reads (None: the base teacher)."""

    name: str
    config: LinkConfig
    teacher: str | None
    """Whose student teaches."""
    start: str | None
    """Whose student this one goes on from."""
    published: bool


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
    adversarial: AdversarialPlan | None = None
    """Sub-stages and discriminator of every link but the first. null: mean squared error on all links, one run each."""

    def runs(self) -> tuple["LinkRun", ...]:
        """Return the stage runs of the chain in order: one a link, or one a phase of it."""
        found: list[LinkRun] = []
        whole: dict[int, str] = {}  # the run whose student teaches, by its step count
        lora: str | None = None
        for many, few in pairwise(self.chain):
            phases = self._phases(few)
            level = self._teacher_of(many, few)
            start = whole.get(many)
            for name, phase in phases.items():
                run = f"lightning-{many}-{few}" + (f"-{name}" if len(phases) > 1 else "")
                config = self._run(level, few, phase)
                begins = lora if phase.network == "lora" else start
                found.append(LinkRun(run, config, whole.get(level), begins, phase.published))
                start = run
                lora = run if phase.network == "lora" else lora
            whole[few] = found[-1].name
        return tuple(found)

    def _phases(self, steps: int) -> Mapping[str, Phase]:
        if self.adversarial is None:
            return {"": Phase(objective="mse", network=self.links.get(steps, LinkOverride()).network or self.network)}
        if steps == self.chain[1]:
            return self.adversarial.first_phases
        return self.adversarial.one_step_phases if steps == 1 else self.adversarial.phases

    def _teacher_of(self, many: int, few: int) -> int:
        """The link before, or an earlier one of the chain where the recipe names one."""
        wanted = self.adversarial.teachers.get(few, many) if self.adversarial is not None and few != self.chain[1] else many
        return wanted if wanted in self.chain[1:] and wanted > few else many

    def _run(self, teacher_steps: int, steps: int, phase: Phase) -> LinkConfig:
        base, plan = self.link(steps), self.adversarial
        changed: dict[str, Any] = {"teacher_steps": teacher_steps, "network": phase.network}
        if phase.training_steps is not None:
            changed["training_steps"] = phase.training_steps
        rate = phase.learning_rate
        if plan is None or phase.objective == "mse":
            changed["optimizer"] = base.optimizer.model_copy(update={"learning_rate": rate or base.optimizer.learning_rate})
            return base.model_copy(update=changed)
        rate = rate or (plan.lora_learning_rate if phase.network == "lora" else plan.unet_learning_rate)
        optimizer = base.optimizer.model_copy(update={"learning_rate": rate, "betas": plan.betas})
        few = steps <= plan.few_steps
        if steps == 1:
            override = self.links.get(1, LinkOverride())
            changed["prediction"] = override.prediction or plan.one_step_prediction
            changed["conversion_steps"] = plan.conversion_steps if override.conversion_steps is None else override.conversion_steps
        changed |= {
            "optimizer": optimizer,
            "start_timesteps": plan.start_timesteps if few else None,
            "adversarial": AdversarialConfig(
                conditional=phase.objective == "conditional",
                optimizer=optimizer,
                renoise_timesteps=plan.renoise_timesteps if few else (),
                renoise_weights=plan.renoise_weights,
                late_renoise_weights=plan.late_renoise_weights,
                late_fraction=plan.late_fraction,
            ),
        }
        return base.model_copy(update=changed)

    def link(self, steps: int) -> LinkConfig:
        """Return the configuration of the link whose student takes `steps` steps."""
        position = self.chain.index(steps)
        override = self.links.get(steps, LinkOverride())
        changed = {name: value for name in LinkOverride.model_fields if (value := getattr(override, name)) is not None}
        learning_rate = changed.pop("learning_rate", self.optimizer.learning_rate)
        shared = {
            name: getattr(self, name) for name in LinkConfig.model_fields if name in LightningConfig.model_fields and name != "adversarial"
        }
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
