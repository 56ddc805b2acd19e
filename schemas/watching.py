"""What is looked at while a student is trained: alarms that end a bad run, and samples drawn at intervals."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from schemas.base import Field, Mistake, Model, NotIdentity, PositiveInt
from schemas.extractors import Extractor, weights_fit_extractor


class Alarms(Model):
    """What stops training, or takes it back to where it was good. A value that is not finite always does; the others are off until they are set.

    None of the thresholds is published: SDXL-Lightning (arXiv 2402.13929) names no such figure.
    """

    saturated_steps: PositiveInt | None = None
    """Steps in a row in which the discriminator is right about nearly everything, real and fake: its gradient says nothing more. null: off."""
    saturated_accuracy: Annotated[float, Field(gt=0.5, le=1)] = 0.99
    """Accuracy from which on a step counts, on real and fake alike. A loss pinned at 0 is the same: a misjudged sample costs log 2 at least."""
    latent_std_band: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = None
    """Lowest and highest deviation of the student's latents, as a ratio to the reference's of the same batch: the teacher's results, and for
    `lcm` the encoded pictures, for `dmd` these or the pairs' outputs. null: off."""
    latent_mean_drift: Annotated[float, Field(gt=0)] | None = None
    """Highest distance of the student's mean from the reference's, in the reference's deviations. null: off."""
    patience: PositiveInt = 50
    """Steps in a row out of the band before the alarm is raised."""
    action: Literal["stop", "roll_back"] = "stop"
    """`stop`: the run fails with the reason. `roll_back`: it goes back to the newest anchor from before the first bad step, with lower rates and
    fresh noise."""
    anchor_every: PositiveInt = 500
    """Steps between anchors: whole states, kept until no alarm can ask for them. Part of the result, unlike `checkpoint_every`."""
    rate_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """What every player's learning rate is multiplied by at each roll-back."""
    max_roll_backs: PositiveInt = 3
    """After so many the next alarm stops the run."""

    @property
    def longest(self) -> int:
        """Steps that the slowest alarm looks back."""
        watched = [self.saturated_steps or 1]
        if self.latent_std_band is not None or self.latent_mean_drift is not None:
            watched.append(self.patience)
        return max(watched)


def _band_is_open(alarms: Alarms) -> Iterator[Mistake]:
    band = alarms.latent_std_band
    if band is not None and band[0] >= band[1]:
        yield ("latent_std_band",), list(band), "expected the lowest ratio before the highest, such as [0.5, 2.0]"


Alarms.cross_checks = (_band_is_open,)


class Watch(Model):
    """Samples of the student at intervals, by its own sampler, with their FID to the teacher; the weights of the lowest are kept beside the last."""

    keep: Literal["last", "best"] = "last"
    """Which weights are the student's, read by all that follows: those after the last step, or those of the lowest FID, whose mean over `steps`
    counts. The others lie beside them, in `best/` or `last/`. So few images rank steps of one run and nothing else; but quality can fall with more
    training."""
    steps: tuple[PositiveInt, ...] | None = None
    """Step counts that the student is looked at with, of those it is trained for. null: all of them."""
    every: PositiveInt = 1000
    """Steps between looks; the last step is always looked at."""
    images: Annotated[int, Field(ge=2)] = 256
    """Images of one FID, each with its own caption of the encoded set while there are so many, and its own noise."""
    teacher_steps: PositiveInt = 32
    """Steps of the teacher's images that the FID refers to, drawn once."""
    teacher_guidance_scale: Annotated[float, Field(ge=1)] = 7.0
    """Imagen-convention scale of the teacher's images."""
    extractor: Extractor = "inception"
    """Feature network of the FID, as in `evaluate`."""
    extractor_weights: Annotated[str | None, NotIdentity] = None
    """Its weights, as in `evaluate`. Identity has their content."""
    grid_images: Annotated[int, Field(ge=1, le=32)] = 8
    """Images shown of each look."""
    batch_size: PositiveInt = 8


def unknown_steps(watch: Watch | None, offered: Sequence[int]) -> Iterator[Mistake]:
    """Step counts that are looked at, of a student that is not trained for them."""
    foreign = [] if watch is None or watch.steps is None else sorted(set(watch.steps) - set(offered))
    if foreign:
        yield ("watch", "steps"), foreign, f"expected some of the student's step counts {list(offered)}, or nothing for all"


Watch.cross_checks = (weights_fit_extractor,)
