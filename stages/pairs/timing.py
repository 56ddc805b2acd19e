"""How long pairs take, by timed calls of the teacher's UNet."""

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from schemas.pairs import PairsConfig
from stages.diffusion.conditioning import blank_text
from stages.diffusion.facts import inspect, read_config
from stages.pairs.content import planned_content
from stages.pairs.draw import Drawer

_TIMED: Final = 3
"""Calls, of which the median counts; one before them is not counted."""


@dataclass(frozen=True)
class TimedCall:
    """One call of the network for a batch, with the sampler's arithmetic."""

    seconds: float
    batch_size: int
    """Pairs; guided ones are twice as many samples."""


def time_a_call(config: PairsConfig, teacher: Path, resolution_px: int | None, device: str) -> TimedCall:
    """Load the UNet of a pipeline folder onto the device and call it as `pairs` will for pictures of `resolution_px` (None: the teacher's own), with
    text of zeros.

    Raises `BadInput` for a sampler that cannot take the teacher, and `RunFailed` where one pair does not fit the memory.
    """
    facts = inspect(teacher)
    channels, side, _ = facts.latent_shape
    side = side if resolution_px is None else resolution_px * side // facts.resolution
    content = planned_content(config, facts, (channels, side, side), seed=0, device=device)
    tokens = json.loads((teacher / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))["model_max_length"]
    text = blank_text(read_config(teacher, "unet"), int(tokens), 1)
    drawer = Drawer(teacher, content, device)
    batch = content.batch_size if config.batch_size is not None or device == "cpu" else drawer.fitting(content.batch_size, text)
    seconds = []
    for _ in range(1 + _TIMED):
        started = time.perf_counter()
        drawer.one_call(batch, text)
        seconds.append(time.perf_counter() - started)
    return TimedCall(statistics.median(seconds[1:]), batch)
