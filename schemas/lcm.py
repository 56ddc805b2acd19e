"""Recipe section of `lcm`: latent consistency distillation (LCM, arXiv 2310.04378; LCM-LoRA, arXiv 2311.05556)."""

from typing import Annotated, Literal

from schemas.base import Field
from schemas.training import OptimizerConfig, PositiveInt, StudentTraining


class LcmConfig(StudentTraining):
    """`lcm`: a LoRA that turns its base into a latent consistency model."""

    guidance_w: Annotated[float, Field(ge=0)] = 7.5
    """LCM-convention scale cond + w (cond - uncond); equals Imagen scale w + 1. Fixed at 7.5 in LCM-LoRA."""
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
    optimizer: OptimizerConfig = OptimizerConfig(name="adamw", learning_rate=1e-4, weight_decay=1e-2)
    """diffusers' LoRA scripts; not published in the paper."""
