"""Latency, throughput and peak memory of a row, measured by the sampler that made its pictures."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from schemas.evaluation import EvaluateConfig
from stages.diffusion.denoiser import Denoiser
from stages.evaluate.metrics.bootstrap import Array, interval
from stages.evaluate.rows import Row
from stages.evaluate.samples import Sampler
from stages.training.randomness import derive_seed


@dataclass(frozen=True)
class Timing:
    """Sampling and decoding of pictures whose prompts are encoded already."""

    latency_seconds: float
    """From noise to a picture, one at a time: median."""
    latency_interval: Sequence[float]
    """Its ends, of resamples of the repeats (the bootstrap): what this machine varies by in a row, and not from day to day."""
    images_per_second: float
    """In batches: median."""
    throughput_interval: Sequence[float]
    batch_size: int
    peak_memory_bytes: int | None
    """Highest allocation on the GPU during the batches, weights included. None on a CPU."""
    device: str

    def as_json(self) -> dict[str, Any]:
        """For `report.json`."""
        return asdict(self)


def time_row(row: Row, denoiser: Denoiser, sampler: Sampler, config: EvaluateConfig) -> Timing:
    """Time `config.timing` single pictures and as many batches, after one of each that is not counted."""
    device = str(sampler.pipeline.device)
    single = _seconds(row, denoiser, sampler.of_batch(1), config)
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    batch = min(sampler.batch_size, len(sampler.prompts.images))
    together = batch / _seconds(row, denoiser, sampler, config)
    return Timing(
        latency_seconds=float(np.median(single)),
        latency_interval=interval_of_median(single, config, sampler.seed),
        images_per_second=float(np.median(together)),
        throughput_interval=interval_of_median(together, config, sampler.seed),
        batch_size=batch,
        peak_memory_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
    )


def interval_of_median(measured: Array, config: EvaluateConfig, seed: int) -> tuple[float, float]:
    """Percentile interval of the median of `measured`, (repeats,), which are drawn again with replacement."""
    random = np.random.default_rng(derive_seed(seed, "timing"))
    return interval(np.median(random.choice(measured, (config.resamples, len(measured))), axis=1), config.confidence)


def _seconds(row: Row, denoiser: Denoiser, sampler: Sampler, config: EvaluateConfig) -> Array:
    """(repeats,)"""
    assert config.timing is not None, "the caller was asked to"
    sampler.batch(row, denoiser, 0)  # encodes the prompts, chooses kernels
    taken = []
    for _ in range(config.timing):
        started = time.perf_counter()
        sampler.batch(row, denoiser, 0)  # its pictures are on the host when it returns: nothing is left running
        taken.append(time.perf_counter() - started)
    return np.array(taken)
