"""What the one training loop can be told, shared by every section that trains."""

from typing import Annotated, Literal

from schemas.base import Field, Model, NotIdentity, PositiveInt
from schemas.watching import Alarms, Watch

__all__ = ["OptimizerConfig", "PositiveInt", "StudentTraining", "TrainingConfig"]


class OptimizerConfig(Model):
    """Adam or AdamW."""

    name: Literal["adam", "adamw"] = "adam"
    learning_rate: Annotated[float, Field(gt=0)]
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0


class TrainingConfig(Model):
    """How long, how large, how precise. Each method's section adds its optimiser and its own fields."""

    training_steps: PositiveInt
    """Optimiser steps of the student."""
    batch_size: PositiveInt
    """Samples of one optimiser step, over all devices and accumulation steps."""
    accumulation_steps: Annotated[PositiveInt, NotIdentity] = 1
    """Parts that each process cuts its share of a batch in, to fit memory. It and the number of processes together must divide `batch_size`; neither
    is part of the result but for float rounding, so that a run goes on with fewer devices and more parts, or the other way round."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape after the warm-up; cosine and linear end at zero on the last step."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Global L2 norm that gradients are clipped to. null: not clipped, but measured."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast with float32 master weights."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the student's moving average a step; where set, the average is what is published."""
    gradient_checkpointing: Annotated[bool, NotIdentity] = False
    """Recompute activations in the backward pass: less memory, about a third more time, the same result."""
    alarms: Alarms = Alarms()
    """What stops the training, or takes it back."""
    world_size: Annotated[PositiveInt | None, NotIdentity] = None
    """Processes that train together, one a device, each with its part of every batch. null: one for each CUDA device; one elsewhere."""
    sharding: Annotated[Literal["none", "optimizer", "full"], NotIdentity] = "none"
    """What each of several processes holds but a part of: nothing; the optimiser's moments (ZeRO); or weights, gradients, moments and averages of
    what is trained (FSDP2). One process holds all. Checkpoints do not depend on it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Seed of data order and noise. null: the recipe's."""
    checkpoint_every: Annotated[PositiveInt, NotIdentity] = 500
    """Optimiser steps between checkpoints."""
    log_every: Annotated[PositiveInt, NotIdentity] = 50
    """Optimiser steps between lines in the log. The metrics table has every step."""


class StudentTraining(TrainingConfig):
    """Training of a student, which can be sampled on the way."""

    watch: Watch | None = None
    """Samples at intervals, and the best weights kept beside the last. null: none are drawn."""
