"""The picture of weights: one prompt from one noise, the acceleration's weight down and the style's across."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from stages.compose.sources import ACCELERATION, Sources
from stages.evaluate.grid import Group, Pixels, draw_grid
from stages.evaluate.rows import Row

ACCELERATION_WEIGHTS = (0.0, 0.5, 0.75, 1.0)
STYLE_WEIGHTS = (0.0, 0.4, 0.8, 1.2)
"""Shown beside the weights that were asked for."""


def draw_weights(pipeline: Any, sources: Sources, prompt: str, seed: int) -> Image.Image:
    """Draw the grid with a diffusers pipeline that has the adapters; it keeps the scheduler and the last weights. Only the first style's vary."""
    sampling, weights = sources.sampling, sources.weights
    style = sources.ingredients[1].adapter
    down = sorted({*ACCELERATION_WEIGHTS, weights[ACCELERATION]})
    across = sorted({*STYLE_WEIGHTS, weights[style]})
    steps = min(sampling.steps, key=lambda count: abs(count - 4))
    pipeline.scheduler = sources.scheduler

    def draw(acceleration: float, of_style: float) -> Pixels:
        chosen = weights | {ACCELERATION: acceleration, style: of_style}
        pipeline.set_adapters(list(chosen), adapter_weights=list(chosen.values()))
        generator = torch.Generator().manual_seed(seed)
        drawn = pipeline(prompt, num_inference_steps=steps, guidance_scale=sampling.guidance_scale, generator=generator).images[0]
        return np.asarray(drawn)

    rows = tuple(
        Row(
            style,
            f"{style} {weight:g}",
            steps,
            sampling.timesteps[steps],
            sampling.sampler,
            sampling.prediction_type,
            sampling.guidance_scale,
        )
        for weight in across
    )
    pictures = [[[draw(acceleration, of_style) for acceleration in down] for of_style in across]]
    return draw_grid([f"{prompt}, {ACCELERATION} {weight:g}" for weight in down], (Group(steps, rows),), pictures)
