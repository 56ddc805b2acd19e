"""Recipe section of `lcm`: latent consistency distillation (LCM, arXiv 2310.04378; LCM-LoRA, arXiv 2311.05556)."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from schemas.base import Field, Mistake, NotIdentity
from schemas.training import OptimizerConfig, PositiveInt, StudentTraining
from schemas.watching import unknown_steps

LEARNING_RATES = {"unet": 8e-6, "lora": 1e-4}
"""LCM 5.1; diffusers' LoRA scripts, for the LoRA's is not published."""


def _optimizer(fields: dict[str, Any]) -> OptimizerConfig:
    rate = LEARNING_RATES[fields.get("network", "lora")]
    return OptimizerConfig(name="adamw", learning_rate=rate, weight_decay=1e-2)


class LcmConfig(StudentTraining):
    """`lcm`: a UNet, or a LoRA on the teacher's, that is a latent consistency model."""

    network: Literal["unet", "lora"] = "lora"
    """`unet`: all of a copy of the teacher's UNet (LCM). `lora`: an adapter of it (LCM-LoRA)."""
    start: Annotated[str | None, NotIdentity] = None
    """Student to go on from, of the same teacher, network, rank and alpha: a folder with `unet/` or `pytorch_lora_weights.safetensors`, such as a
    variant of a published model. Its content is part of the identity. null: the teacher."""
    latents: Annotated[Literal["encode", "pairs"], NotIdentity] = "encode"
    """What the student is trained on: the encoded pictures, or what the teacher itself drew (the section `pairs`). No part of the identity, which has
    that of the artifact."""
    solver: Literal["ddim", "known_noise"] = "ddim"
    """What leads from t_{n+k} to t_n: `ddim`, a guided move of the teacher; `known_noise`, the noise that was added, by which a latent consistency
    model is fine-tuned without its teacher (LCF, LCM 4.4)."""
    target_decay: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """mu of a UNet's target network theta- = mu theta- + (1 - mu) theta after every step, which is what is published. diffusers' scripts; .999943 in
    LCM, for 100,000 steps. The target of a LoRA is the LoRA itself."""
    guidance_w: Annotated[float, Field(ge=0)] = 7.5
    """LCM-convention scale cond + w (cond - uncond); equals Imagen scale w + 1. Fixed at 7.5 in LCM-LoRA. With `guidance_w_range` that with which the
    student is sampled and published."""
    guidance_w_range: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] | None = None
    """Lowest and highest w that a UNet is trained for: drawn for every sample and told to the student, which can then be sampled with any of them.
    [2, 14] in LCM, [3, 15] in diffusers' scripts. null: `guidance_w` alone, and no such input."""
    ddim_timesteps: PositiveInt = 50
    """Steps of the DDIM solver's grid. The papers' skip k = 20 training timesteps is T / 50."""
    sigma_data: Annotated[float, Field(gt=0)] = 0.5
    timestep_scaling: Annotated[float, Field(gt=0)] = 10.0
    """s of the boundary conditions c_skip and c_out (LCM appendix; diffusers)."""
    loss: Literal["l2", "huber"] = "huber"
    huber_c: Annotated[float, Field(gt=0)] = 0.001
    lora_rank: PositiveInt = 64
    lora_alpha: Annotated[float, Field(gt=0)] = 64
    steps: tuple[PositiveInt, ...] = (8, 4, 2, 1)
    """Step counts the student is evaluated and published for."""
    training_steps: PositiveInt = 1000
    batch_size: PositiveInt = 12
    """diffusers' script."""
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    optimizer: OptimizerConfig = Field(default_factory=_optimizer)
    """Where not given: AdamW with weight decay 1e-2 (diffusers' scripts), at 8e-6 for a UNet (LCM 5.1) and 1e-4 for a LoRA (diffusers' scripts; not
    published)."""


def _a_unet_has_one_average(config: LcmConfig) -> Iterator[Mistake]:
    if config.network == "unet" and config.ema_decay is not None:
        expected = "the target network is the moving average of a UNet: expected its decay in target_decay, and nothing here"
        yield ("ema_decay",), config.ema_decay, expected


def _guidance_is_in_its_range(config: LcmConfig) -> Iterator[Mistake]:
    bounds = config.guidance_w_range
    if bounds is None:
        return
    if config.network == "lora":
        yield ("guidance_w_range",), list(bounds), "a LoRA has no input for w: expected network: unet, or null here"
    if bounds[0] >= bounds[1]:
        yield ("guidance_w_range",), list(bounds), "expected the lowest w before the highest, such as [2, 14]"
    elif not bounds[0] <= config.guidance_w <= bounds[1]:
        expected = f"the student is not trained for it: expected a w in guidance_w_range = {list(bounds)}"
        yield ("guidance_w",), config.guidance_w, expected


def _looks_are_at_its_steps(config: LcmConfig) -> Iterator[Mistake]:
    yield from unknown_steps(config.watch, config.steps)


LcmConfig.cross_checks = (_a_unet_has_one_average, _guidance_is_in_its_range, _looks_are_at_its_steps)
