"""The picture of weights: one prompt from one noise, the acceleration's weight down and across that of each style in turn."""

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
    """Draw the grid with a diffusers pipeline that has the adapters; it keeps the scheduler and the last weights.

    Every style has columns of its own, in which the others keep the weights that were asked for: of all combinations nobody would see more.
    """
    sampling, weights = sources.sampling, sources.weights
    down = sorted({*ACCELERATION_WEIGHTS, weights[ACCELERATION]})
    across = {one.adapter: sorted({*STYLE_WEIGHTS, one.weight}) for one in sources.ingredients if one.adapter != ACCELERATION}
    steps = min(sampling.steps, key=lambda count: abs(count - 4))
    pipeline.scheduler = sources.scheduler

    def draw(acceleration: float, style: str, of_style: float) -> Pixels:
        chosen = weights | {ACCELERATION: acceleration, style: of_style}
        pipeline.set_adapters(list(chosen), adapter_weights=list(chosen.values()))
        generator = torch.Generator().manual_seed(seed)
        drawn = pipeline(prompt, num_inference_steps=steps, guidance_scale=sampling.guidance_scale, generator=generator).images[0]
        return np.asarray(drawn)

    def column(style: str, weight: float) -> Row:
        facts = (steps, sampling.timesteps[steps], sampling.sampler, sampling.prediction_type, sampling.guidance_scale)
        return Row(style, f"{style} {weight:g}", *facts)

    groups = [Group(steps, tuple(column(style, weight) for weight in of_style)) for style, of_style in across.items()]
    pictures = [[[draw(each, style, weight) for each in down] for weight in of_style] for style, of_style in across.items()]
    return draw_grid([f"{prompt}, {ACCELERATION} {weight:g}" for weight in down], groups, pictures)
