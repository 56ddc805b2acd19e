"""What a run of `pairs` will make, as its manifest will say, known before anything is drawn."""

from typing import Final

from schemas.manifest import Pairs
from schemas.pairs import PairsConfig
from stages.diffusion.facts import TeacherFacts
from stages.diffusion.sampling import check_sampler

_ON_A_CPU: Final = 16
"""Pairs drawn together where the recipe leaves it open: a CPU gains nothing by more."""
_TRIED: Final = 64
"""On a device whose memory is tried first: guided ones are 128 samples, and no GPU of today gains by more."""
_NOTHING: Final = "0" * 64


def check_pairs(config: PairsConfig, facts: TeacherFacts) -> None:
    """Raise `BadInput` for a sampler that cannot take the teacher."""
    check_sampler(config.sampler, facts.scheduler_config, facts.prediction_type, config.steps)


def planned_content(
    config: PairsConfig,
    facts: TeacherFacts,
    latent_shape: tuple[int, int, int],
    *,
    seed: int,
    device: str,
    teacher: str = _NOTHING,
    latents: str = _NOTHING,
) -> Pairs:
    """What will be made; where the batch is left to a device's memory, with the largest that is tried. Raises `BadInput` as `check_pairs`.

    A teacher that is told sizes is told those of its own pictures, as diffusers' pipelines do: uncropped, as large as asked. `seed` is the recipe's;
    `teacher` and `latents` are identities.
    """
    check_pairs(config, facts)
    downscale = facts.resolution // facts.latent_shape[1]
    height, width = latent_shape[1] * downscale, latent_shape[2] * downscale
    return Pairs(
        pairs=config.count,
        shards=-(-config.count // config.shard_pairs),
        latent_shape=latent_shape,
        teacher=teacher,
        latents=latents,
        time_ids=(height, width, 0, 0, height, width) if facts.architecture == "StableDiffusionXLPipeline" else None,
        sampler=config.sampler,
        steps=config.steps,
        guidance_scale=config.guidance_scale,
        precision=config.precision,
        seed=seed if config.seed is None else config.seed,
        batch_size=config.batch_size or (_ON_A_CPU if device == "cpu" else min(_TRIED, config.shard_pairs)),
        shard_pairs=config.shard_pairs,
    )
