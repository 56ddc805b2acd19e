"""Every metric by name: what it is computed from, what people call it, and which way is better."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from schemas.protocols import MetricGroup
from stages.evaluate.metrics.bootstrap import Estimate
from stages.evaluate.metrics.frechet import frechet
from stages.evaluate.metrics.kid import kid
from stages.evaluate.metrics.neighbours import DENSITY_NEIGHBOURS, PRECISION_NEIGHBOURS, density_coverage, precision_recall
from stages.evaluate.metrics.sets import FeatureSet

View = Literal["whole", "patch"]
"""What of a picture is shown to the feature network."""

KID_UNIT: Final = 1000
"""KID is told times this, as papers do."""

REFERENCES: Final = {"teacher": "other samples of the teacher", "real": "real images"}
"""What sets of pictures are measured against."""


@dataclass(frozen=True)
class Metric:
    """A column of scores."""

    title: str
    unit: str
    """What an axis says."""
    higher_is_better: bool = False


@dataclass(frozen=True)
class Group:
    """Metrics that come from one comparison of two sets of features."""

    view: View
    compare: Callable[[FeatureSet, FeatureSet], Mapping[str, Estimate]]
    """The measured set and its reference to estimates, by the names in `metrics`."""
    metrics: Mapping[str, Metric]
    least_images: int = 2


GROUPS: Final[Mapping[MetricGroup, Group]] = {
    "fid": Group("whole", lambda own, reference: {"fid": frechet(own, reference)}, {"fid": Metric("FID", "FID")}),
    "patch_fid": Group(
        "patch", lambda own, reference: {"patch_fid": frechet(own, reference)}, {"patch_fid": Metric("Patch FID", "patch FID")}
    ),
    "kid": Group(
        "whole", lambda own, reference: {"kid": kid(own, reference).scaled(KID_UNIT)}, {"kid": Metric("KID x 1000", "KID x 1000")}
    ),
    "precision_recall": Group(
        "whole",
        precision_recall,
        {name: Metric(name.capitalize(), name, higher_is_better=True) for name in ("precision", "recall")},
        PRECISION_NEIGHBOURS + 1,
    ),
    "density_coverage": Group(
        "whole",
        density_coverage,
        {name: Metric(name.capitalize(), name, higher_is_better=True) for name in ("density", "coverage")},
        DENSITY_NEIGHBOURS + 1,
    ),
}
"""Every group of `evaluate.metrics` that compares sets."""

PICTURE_METRICS: Final[Mapping[str, tuple[MetricGroup, Metric]]] = {
    "clip_score": ("clip_score", Metric("CLIP score, 100 x cosine of picture and prompt", "CLIP score", higher_is_better=True)),
    "lpips_teacher": ("lpips", Metric("Perceptual distance to the reference's picture from the same noise", "LPIPS")),
    "diversity": ("diversity", Metric("Diversity: perceptual distance within a prompt", "LPIPS", higher_is_better=True)),
}
"""Means of one number a picture, by the name among a row's scores, each with what asks for it in `evaluate.metrics`."""


def _all() -> dict[str, Metric]:
    found = {
        f"{name}_{reference}": Metric(f"{metric.title} against {words}", metric.unit, metric.higher_is_better)
        for group in GROUPS.values()
        for name, metric in group.metrics.items()
        for reference, words in REFERENCES.items()
    }
    return found | {name: metric for name, (_, metric) in PICTURE_METRICS.items()}


METRICS: Final[Mapping[str, Metric]] = _all()
"""By the name they have among a row's scores."""
