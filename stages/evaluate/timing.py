"""Latency, throughput and peak memory of a row, measured by the sampler that made its pictures."""

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from stages.diffusion.denoiser import Denoiser
from stages.evaluate.rows import Row
from stages.evaluate.samples import Sampler


@dataclass(frozen=True)
class Timing:
    """Sampling and decoding of pictures whose prompts are encoded already."""

    latency_seconds: float
    """From noise to a picture, one at a time: median."""
    images_per_second: float
    """In batches: median."""
    batch_size: int
    peak_memory_bytes: int | None
    """Highest allocation on the GPU during the batches, weights included. None on a CPU."""
    device: str

    def as_json(self) -> dict[str, Any]:
        """For `report.json`."""
        return asdict(self)


def time_row(row: Row, denoiser: Denoiser, sampler: Sampler, repeats: int) -> Timing:
    """Time `repeats` single pictures and `repeats` batches, after one of each that is not counted."""
    device = str(sampler.pipeline.device)
    single = _seconds(row, denoiser, sampler.of_batch(1), repeats)
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    batch = min(sampler.batch_size, len(sampler.prompts.images))
    together = _seconds(row, denoiser, sampler, repeats)
    return Timing(
        latency_seconds=single,
        images_per_second=batch / together,
        batch_size=batch,
        peak_memory_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
    )


def _seconds(row: Row, denoiser: Denoiser, sampler: Sampler, repeats: int) -> float:
    sampler.batch(row, denoiser, 0)  # encodes the prompts, chooses kernels
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        sampler.batch(row, denoiser, 0)  # its pictures are on the host when it returns: nothing is left running
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)
