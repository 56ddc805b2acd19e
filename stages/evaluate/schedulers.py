"""The diffusers scheduler of a student or a teacher, held against the timesteps that its manifest promises."""

from collections.abc import Mapping, Sequence
from typing import Any

from schemas.errors import BadInput
from stages.diffusion.sampling import make_scheduler


def checked_scheduler(
    name: str, sampler: str, scheduler_config: Mapping[str, Any], prediction_type: str, grids: Sequence[Sequence[int]]
) -> Any:
    """Return the scheduler for models that are sampled on `grids`, each a list of timesteps, descending.

    Raises `BadInput`, naming the model, where the scheduler of that many steps uses others.
    """
    scheduler = make_scheduler(sampler, scheduler_config, prediction_type, grids[0] if grids else ())
    for grid in grids:
        scheduler.set_timesteps(len(grid))
        found = [int(timestep) for timestep in scheduler.timesteps]
        if found != list(grid):
            raise BadInput(f"{name}: its manifest names the timesteps {list(grid)}, its sampler {sampler} uses {found}")
    return scheduler
