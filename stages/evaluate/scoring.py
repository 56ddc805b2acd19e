"""Scores of rows with their intervals: every metric of the recipe, against every reference, with one resampling for all rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from schemas.errors import BadInput
from schemas.evaluation import EvaluateConfig
from stages.evaluate.metrics.bootstrap import Array, Estimate, Resampling, draws, interval
from stages.evaluate.metrics.catalogue import GROUPS, REFERENCES, View
from stages.evaluate.metrics.frechet import frechet
from stages.evaluate.metrics.sets import FeatureSet
from stages.training.randomness import derive_seed

Sets = Mapping[View, FeatureSet]
"""Features of one set of pictures, by what was shown of them."""

DECIMALS: Final = 6
"""Digits of a score after the point: features are float32, so what follows is rounding."""


@dataclass(frozen=True, eq=False)
class Score:
    """A metric of a row."""

    value: float
    low: float
    high: float
    draws: Array
    """(resamples,): the metric in every resample. Those of two rows belong together draw by draw."""

    @classmethod
    def of(cls, value: float, drawn: Array, confidence: float) -> Self:
        """Value and interval, rounded."""
        low, high = interval(drawn, confidence)
        return cls(round(value, DECIMALS), round(low, DECIMALS), round(high, DECIMALS), drawn)


class Scoring:
    """What all rows are measured against."""

    def __init__(self, config: EvaluateConfig, prompts: Sequence[str], references: Mapping[str, Sets], seed: int) -> None:
        """`prompts`: of every image of a row, and of the teacher's other samples, which are of the same prompts. `references`: by the keys of
        `REFERENCES`."""
        self.config, self.references = config, references
        self.own = Resampling.of_prompts(prompts, config.resamples, seed)
        real = Resampling.of_pictures(references["real"]["whole"].images, config.resamples, derive_seed(seed, "real"))
        self.resampling = {"teacher": self.own, "real": real}

    def score(self, row: Sets, of_pictures: Mapping[str, NDArray[np.floating]]) -> dict[str, Score]:
        """Every metric of a row by name; `of_pictures` are numbers of its pictures, (N,), whose means are metrics too."""
        found: dict[str, Score] = {}
        for name in self.config.metrics:
            if name in GROUPS:
                group = GROUPS[name]
                for reference in REFERENCES:
                    estimates = group.compare(row[group.view], self.references[reference][group.view])
                    for metric, estimate in estimates.items():
                        found[f"{metric}_{reference}"] = self._score(estimate, self.resampling[reference])
        return found | {name: self._score(Estimate.of_mean(values), None) for name, values in of_pictures.items()}

    def between(self, own: FeatureSet, reference: FeatureSet) -> Score:
        """FID of two sets of pictures of the table's prompts, picture by picture."""
        return self._score(frechet(own, reference), self.own)

    def _score(self, estimate: Estimate, reference: Resampling | None) -> Score:
        return Score.of(estimate.value, draws(estimate, self.own, reference), self.config.confidence)


def check_scoring(config: EvaluateConfig, images: int, real_images: int, resolution: int) -> None:
    """Raise `BadInput` for too few images, of a row or real ones, and for a patch larger than the samples (`resolution`, pixels)."""
    for name in config.metrics:
        least = GROUPS[name].least_images if name in GROUPS else 1
        if min(images, real_images) < least:
            raise BadInput(f"evaluate.metrics: {name} of {images} samples and {real_images} real images; expected at least {least} of each")
    if "patch_fid" in config.metrics and resolution < config.patch_px:
        raise BadInput(f"evaluate.patch_px: {config.patch_px}; expected at most {resolution}, the side of the teacher's pictures")
