"""The adversarial part of `lightning`'s recipe section: what the discriminator sees, and in which phases a link is trained (SDXL-Lightning)."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from schemas.base import Field, Mistake, Model
from schemas.training import OptimizerConfig, PositiveInt

Timestep = Annotated[int, Field(ge=0, lt=1000)]
Weights = tuple[Annotated[float, Field(gt=0)], ...]
PhaseName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
"""The end of a run's name, and of its page's in Prefect: lower case, digits, dashes."""


class AdversarialConfig(Model):
    """The discriminator of one sub-stage (SDXL-Lightning 3.2 to 3.4, 3.7)."""

    conditional: bool = True
    """Whether the discriminator sees x_t too (eq. 22), which keeps the teacher's flow; without (eq. 23) modes are covered more freely."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6, betas=(0.0, 0.99))
    """Of the discriminator; the same as the student's in SDXL-Lightning 3.6."""
    renoise_timesteps: tuple[Timestep, ...] = ()
    """t*: the discriminator judges predictions of x0, noised anew to one of these (eq. 25, 26). Empty: it judges x_{t-ns} itself.
    SDXL-Lightning 3.7 for two and one step: 10, 250, 500, 750, here as indices."""
    renoise_weights: Weights = (1, 1, 1, 1)
    """How often each t* is drawn, relative. SDXL-Lightning 3.7."""
    late_renoise_weights: Weights = (5, 1, 1, 1)
    """The same in the last part of the training. SDXL-Lightning 3.7; when to change is not published."""
    late_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the training, at its end, in which the late weights hold."""


class Phase(Model):
    """One sub-stage of a link: an artifact of its own."""

    objective: Literal["mse", "conditional", "unconditional"]
    """Mean squared error, or adversarial with the discriminator of eq. 22 or 23."""
    network: Literal["unet", "lora"]
    """`lora`: an adapter of the base teacher, going on from the chain's newest LoRA. `unet`: everything."""
    start: Literal["phase", "link"] = "phase"
    """What a `unet` goes on from: the phase before, its LoRA merged, as in SDXL-Lightning 3.6; or the last student of the link before (the base
    teacher, in the first), which keeps LoRAs and UNets apart."""
    training_steps: PositiveInt | None = None
    """null: the section's."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Of the student, and of the discriminator where it has none of its own. null: the section's for `mse`, else that of `adversarial` for the
    network."""
    published: bool = True
    """Whether its student is evaluated and published."""


ALL_PHASES: Mapping[str, Phase] = {
    "conditional": Phase(objective="conditional", network="lora", published=False),
    "lora": Phase(objective="unconditional", network="lora"),
    "unet": Phase(objective="unconditional", network="unet"),
}
"""SDXL-Lightning 3.6: LoRA with the conditional objective, LoRA with the unconditional one, the whole UNet with the unconditional one."""

ONE_STEP_PHASES: Mapping[str, Phase] = {
    "conditional": Phase(objective="conditional", network="unet", published=False),
    "unet": Phase(objective="unconditional", network="unet"),
}
"""No LoRA, because it cannot carry the switch to x0 (SDXL-Lightning 3.6, 3.7.3)."""

FIRST_PHASES: Mapping[str, Phase] = {
    "lora": Phase(objective="mse", network="lora", published=False),
    "unet": Phase(objective="mse", network="unet"),
}
"""The guided link trains a LoRA too, from which the LoRAs of the later links go on: a published LoRA is relative to the base teacher. Ours."""


class AdversarialPlan(Model):
    """How all links but the first are trained, where the chain is adversarial."""

    lora_learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """SDXL-Lightning 3.6."""
    unet_learning_rate: Annotated[float, Field(gt=0)] = 5e-7
    """SDXL-Lightning 3.6."""
    discriminator_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """null: the student's, as in SDXL-Lightning 3.6."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.0, 0.99)
    """SDXL-Lightning 3.6."""
    phases: Mapping[PhaseName, Phase] = ALL_PHASES
    """By name, in order; the last makes the teacher of later links, a LoRA too: it is then merged into the base."""
    one_step_phases: Mapping[PhaseName, Phase] = ONE_STEP_PHASES
    one_step_prediction: Literal["teacher", "sample"] = "sample"
    """SDXL-Lightning 3.7.3: the one-step student says x0."""
    conversion_steps: Annotated[int, Field(ge=0)] = 1000
    """Steps of eq. 27 before its first phase. Not published."""
    conversion_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Not published. null: that of the section's links with a squared error, which the conversion is too."""
    first_phases: Mapping[PhaseName, Phase] = FIRST_PHASES
    """Of the first link, which absorbs the guidance."""
    teachers: Mapping[PositiveInt, PositiveInt] = {2: 8, 1: 4}
    """Step count of the student that teaches, by the step count of the one that learns; where not given, the link before. SDXL-Lightning 3.4 takes
    an earlier stage for two and one step; which is not published."""
    few_steps: PositiveInt = 2
    """Students of at most so many steps get the stabilisers of SDXL-Lightning 3.7: the timesteps below, and re-noising."""
    start_timesteps: tuple[Timestep, ...] = (249, 499, 749, 999)
    """SDXL-Lightning 3.7.1."""
    renoise_timesteps: tuple[Timestep, ...] = (10, 249, 499, 749)
    """SDXL-Lightning 3.7.2."""
    renoise_weights: Weights = (1, 1, 1, 1)
    late_renoise_weights: Weights = (5, 1, 1, 1)
    late_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5
    """When the late weights begin is not published."""


def _levels_have_weights(config: AdversarialConfig | AdversarialPlan) -> Iterator[Mistake]:
    levels = len(config.renoise_timesteps)
    for name in ("renoise_weights", "late_renoise_weights"):
        weights = getattr(config, name)
        if levels and len(weights) != levels:
            yield (name,), list(weights), f"expected {levels}, one for each of renoise_timesteps"


def _links_have_phases(plan: AdversarialPlan) -> Iterator[Mistake]:
    for name in ("phases", "one_step_phases", "first_phases"):
        if not getattr(plan, name):
            yield (name,), {}, "expected at least one phase"


AdversarialConfig.cross_checks = (_levels_have_weights,)
AdversarialPlan.cross_checks = (_levels_have_weights, _links_have_phases)
