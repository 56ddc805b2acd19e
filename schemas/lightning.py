"""Recipe section of `lightning`: progressive distillation along a nested chain of step counts (SDXL-Lightning, arXiv 2402.13929)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

from schemas.adversarial import AdversarialConfig, AdversarialPlan, Phase
from schemas.base import Field, Mistake, Model, NotIdentity
from schemas.training import OptimizerConfig, PositiveInt, StudentTraining

TRAIN_TIMESTEPS = 1000
"""T of every UNet teacher of this family; a paper's timestep T is index T - 1."""


def trailing_timesteps(steps: int, train_timesteps: int = TRAIN_TIMESTEPS) -> tuple[int, ...]:
    """Timesteps of the trailing grid, descending from T - 1: round(T - i T / N) - 1 (SDXL-Lightning 3.5).

    The rounding is half-to-even, as numpy's and so diffusers' is.
    """
    return tuple(round(train_timesteps - i * train_timesteps / steps) - 1 for i in range(steps))


class LinkConfig(StudentTraining):
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
    conversion_optimizer: OptimizerConfig | None = None
    """null: `optimizer`. Schedule and warm-up are the link's own."""
    teacher_precision: Literal["bfloat16"] | None = None
    """Type that the teacher's weights are held and computed in. null: float32, computed in `precision`. Its outputs are taken to float32 before any
    arithmetic."""
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


class LightningConfig(StudentTraining):
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
    teacher_precision: Literal["bfloat16"] | None = None
    """Type that the teacher's weights are held and computed in. null: float32, computed in `precision`. Its outputs are taken to float32 before any
    arithmetic."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)
    """Adam(.9, .999), 1e-5, no weight decay: SDXL-Lightning 3.6, of the MSE links."""
    latents: Annotated[Literal["encode", "pairs"], NotIdentity] = "encode"
    """What students are trained on: the encoded pictures, or what the teacher itself drew (the section `pairs`; LADD, arXiv 2403.12015, 3). No part
    of the identity, which has that of the artifact."""
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
                begins = lora if phase.network == "lora" else whole.get(many) if phase.start == "link" else start
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
        judge = optimizer.model_copy(update={"learning_rate": plan.discriminator_learning_rate or rate})
        few = steps <= plan.few_steps
        if steps == 1:
            override = self.links.get(1, LinkOverride())
            changed["prediction"] = override.prediction or plan.one_step_prediction
            changed["conversion_steps"] = plan.conversion_steps if override.conversion_steps is None else override.conversion_steps
            rate = plan.conversion_learning_rate or base.optimizer.learning_rate
            changed["conversion_optimizer"] = base.optimizer.model_copy(update={"learning_rate": rate})
        changed |= {
            "optimizer": optimizer,
            "start_timesteps": plan.start_timesteps if few else None,
            "adversarial": AdversarialConfig(
                conditional=phase.objective == "conditional",
                optimizer=judge,
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


def _starts_lie_on_the_teachers_grid(config: LinkConfig) -> Iterator[Mistake]:
    foreign = sorted(set(config.start_timesteps or ()) - set(trailing_timesteps(config.teacher_steps)))
    if foreign:
        yield ("start_timesteps",), foreign, f"expected entries of the trailing grid of {config.teacher_steps} steps, the teacher's"


def _adversarial_starts_lie_on_grids(config: LightningConfig) -> Iterator[Mistake]:
    plan = config.adversarial
    for many, few in pairwise(config.chain[1:]):
        if plan is not None and few <= plan.few_steps:
            level = config._teacher_of(many, few)
            foreign = sorted(set(plan.start_timesteps) - set(trailing_timesteps(level)))
            if foreign:
                expected = f"the student of {few} steps learns from one of {level}: expected entries of the trailing grid of {level} steps"
                yield ("adversarial", "start_timesteps"), foreign, expected


def _teachers_are_students_of_the_chain(config: LightningConfig) -> Iterator[Mistake]:
    if config.adversarial is None or config.adversarial.teachers == AdversarialPlan().teachers:  # which hold where the chain has them
        return
    for few, many in config.adversarial.teachers.items():
        if few not in config.chain[2:] or many not in config.chain[1:] or many <= few:
            expected = f"expected a step count of {list(config.chain[1:])} to learn from one above it, and neither the first link's"
            yield ("adversarial", "teachers", few), many, expected


def _phases_can_do_what_they_say(config: LightningConfig) -> Iterator[Mistake]:
    plan = config.adversarial
    if plan is None:
        return
    for group in ("first_phases", "phases", "one_step_phases"):
        for name, phase in getattr(plan, group).items():
            place = ("adversarial", group, name)
            if phase.training_steps is not None and phase.training_steps <= config.warmup_steps:
                expected = f"the phase would end inside its warm-up: expected more than lightning.warmup_steps = {config.warmup_steps}"
                yield (*place, "training_steps"), phase.training_steps, expected
            if (phase.network, phase.start) == ("lora", "link"):
                yield (*place, "start"), "link", "a LoRA goes on from the chain's newest; expected nothing here"
            if group == "first_phases" and phase.objective != "mse":
                yield (*place, "objective"), phase.objective, "the first link absorbs the guidance, which only objective: mse can teach"
    for steps in config.chain[2:]:
        override = config.links.get(steps, LinkOverride())
        prediction = override.prediction or (plan.one_step_prediction if steps == 1 else "teacher")
        for name, phase in config._phases(steps).items():
            if prediction == "sample" and phase.network == "lora":
                expected = f"a LoRA cannot carry the switch of {steps} steps to x0-prediction (SDXL-Lightning 3.6); expected network: unet"
                yield ("adversarial", "one_step_phases" if steps == 1 else "phases", name, "network"), "lora", expected


def _conversions_outlast_their_warmup(config: LightningConfig) -> Iterator[Mistake]:
    named: dict[tuple[str | int, ...], int | None] = {
        ("links", steps, "conversion_steps"): override.conversion_steps for steps, override in config.links.items()
    }
    if config.adversarial is not None and 1 in config.chain and config.adversarial.one_step_prediction == "sample":
        named["adversarial", "conversion_steps"] = config.adversarial.conversion_steps
    for place, steps in named.items():
        if steps is not None and 0 < steps <= config.warmup_steps:
            yield (
                place,
                steps,
                f"the conversion would end inside its warm-up: expected more than lightning.warmup_steps = {config.warmup_steps}",
            )


def _phases_alone_say_what_is_trained(config: LightningConfig) -> Iterator[Mistake]:
    if config.adversarial is None:
        return
    if config.network == "lora":
        yield ("network",), "lora", "the phases of lightning.adversarial say what is trained; expected nothing here"
    for steps, override in config.links.items():
        if override.network is not None:
            yield (
                ("links", steps, "network"),
                override.network,
                "the phases of lightning.adversarial say what is trained; expected nothing here",
            )
        adversarial = steps in config.chain[2:] and all(phase.objective != "mse" for phase in config._phases(steps).values())
        if override.learning_rate is not None and adversarial:
            expected = "adversarial phases have the rates of lightning.adversarial or their own; expected nothing here"
            yield ("links", steps, "learning_rate"), override.learning_rate, expected


def _a_link_has_one_step_count(config: LightningConfig) -> Iterator[Mistake]:
    if config.watch is not None and config.watch.steps is not None:
        yield ("watch", "steps"), list(config.watch.steps), "the student of each link has one step count: expected nothing here"


LinkConfig.cross_checks = (_starts_lie_on_the_teachers_grid,)
LightningConfig.cross_checks = (
    _chain_nests,
    _links_are_students,
    _lora_keeps_the_prediction,
    _lora_follows_no_unet,
    _adversarial_starts_lie_on_grids,
    _teachers_are_students_of_the_chain,
    _phases_can_do_what_they_say,
    _conversions_outlast_their_warmup,
    _phases_alone_say_what_is_trained,
    _a_link_has_one_step_count,
)
