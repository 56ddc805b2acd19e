"""Recipe section of `pairs`: noise and what the deterministic teacher makes of it (DMD, arXiv 2311.18828, 3.3)."""

from collections.abc import Iterator
from typing import Annotated, Literal

from schemas.base import Field, Mistake, Model, NotIdentity, PositiveInt
from schemas.lightning import TRAIN_TIMESTEPS

PairSampler = Literal["ddim", "pndm", "heun", "dpmpp"]
"""Deterministic samplers, all on the trailing grid, which begins at pure noise: DDIM (arXiv 2010.02502), PNDM's multistep part without Runge-Kutta
steps (arXiv 2202.09778), Heun's second order (EDM, arXiv 2206.00364), DPM-Solver++ of second order, multistep (arXiv 2211.01095)."""


class PairsConfig(Model):
    """`pairs`: what the teacher draws from noise of its own, with the encoded set's captions, kept with the noise."""

    count: PositiveInt = 500_000
    """Pairs. Pair n has the caption of encoded sample n; where there are more pairs than samples, these are gone through again, with other noise.
    DMD, SD1.5: 500,000 at guidance 3, 12 million at guidance 8."""
    sampler: PairSampler = "pndm"
    """The teacher's sampler. DMD, SD1.5: PNDM with 50 steps."""
    steps: Annotated[int, Field(ge=1, le=TRAIN_TIMESTEPS)] = 50
    """Steps of the sampler: a divisor of 1000. `heun` calls the network 2 steps - 1 times, `pndm` steps + 1 times, the others as often as there are
    steps."""
    guidance_scale: Annotated[float, Field(ge=1)] = 3.0
    """Imagen-convention scale uncond + s (cond - uncond); 1: unguided, and half the work. DMD, SD1.5: 3, and 8."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type the UNet computes in; bfloat16 by autocast. Guidance and the sampler's arithmetic are float32."""
    batch_size: PositiveInt | None = None
    """Pairs drawn together; guided ones go through the UNet twice as many at once. The last bits of an output depend on it, so it is part of the
    identity. null: 16 on a CPU; on a GPU the largest power of two that fits its memory, found once and kept for the whole run."""
    shard_pairs: PositiveInt = 256
    """Pairs in one shard, which is what a killed run loses at most."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Seed of the noise, which is a function of it and the pair's number. null: the recipe's."""
    processes: Annotated[int, Field(ge=1), NotIdentity] = 1
    """Shards drawn at the same time, each by a process of its own. On GPUs no more than there are, each with one."""
    workers: Annotated[int, Field(ge=1, le=1000), NotIdentity] = 1
    """Shares of the shards that a chain has drawn by runs of their own on the pool of `pools.pairs`, as many at a time as workers are free. Without
    a pool: no meaning."""

    @property
    def network_calls(self) -> int:
        """Calls of the network for one batch."""
        return {"heun": 2 * self.steps - 1, "pndm": self.steps + (self.steps > 1)}.get(self.sampler, self.steps)

    @property
    def passes(self) -> int:
        """Samples that go through the network for one pair."""
        return self.network_calls * (2 if self.guidance_scale > 1 else 1)


def _steps_divide_the_schedule(config: PairsConfig) -> Iterator[Mistake]:
    if TRAIN_TIMESTEPS % config.steps:
        below, above = (
            next(n for n in numbers if TRAIN_TIMESTEPS % n == 0) for numbers in (range(config.steps, 0, -1), range(config.steps, 1001))
        )
        expected = f"the sampler would leave its own grid: expected a divisor of {TRAIN_TIMESTEPS}, such as {below} or {above}"
        yield ("steps",), config.steps, expected


def _workers_agree_on_the_batch(config: PairsConfig) -> Iterator[Mistake]:
    if config.workers > 1 and config.batch_size is None:
        yield ("batch_size",), None, f"a number, which fits each of the {config.workers} workers: they draw with one batch size"


PairsConfig.cross_checks = (_steps_divide_the_schedule, _workers_agree_on_the_batch)
