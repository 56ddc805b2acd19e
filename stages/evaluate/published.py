"""Figures that papers publish of themselves, for a reader to know the order of things: of other evaluators, and never to be compared with ours."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from schemas.protocols import Protocol

FewFigures = tuple[str, ...]
"""As the paper prints them, in the order of `Published.metrics`."""


@dataclass(frozen=True)
class Published:
    """One table of one paper."""

    title: str
    source: str
    protocol: Protocol
    """The settings of it that `evaluate.protocol` has."""
    metrics: tuple[str, ...]
    """By the names among a row's scores."""
    models: Mapping[str, Mapping[int, FewFigures]]
    """By the model's name and the evaluations of its network that a picture takes."""
    note: str = ""

    def of(self, metric: str) -> dict[str, dict[int, str]]:
        """Figures of one metric, by model and step count; none where the paper has none."""
        if metric not in self.metrics:
            return {}
        place = self.metrics.index(metric)
        return {model: {steps: figures[place] for steps, figures in by_steps.items()} for model, by_steps in self.models.items()}


PUBLISHED: Final = (
    Published(
        title="SDXL-Lightning",
        source="arXiv 2402.13929, table 2: 10K prompts of COCO, 1024 px",
        protocol="lightning-coco10k",
        metrics=("fid_real", "patch_fid_real", "clip_score"),
        models={
            "SDXL": {32: ("18.49", "35.89", "26.48")},
            "Lightning": {
                8: ("21.43", "33.55", "25.86"),
                4: ("22.30", "33.52", "26.07"),
                2: ("23.11", "35.12", "25.98"),
                1: ("22.61", "41.53", "26.02"),
            },
            "Lightning LoRA": {8: ("22.30", "33.92", "25.77"), 4: ("23.01", "34.10", "26.04"), 2: ("23.39", "40.54", "26.18")},
            "LCM": {4: ("21.85", "42.53", "26.09"), 1: ("80.01", "158.90", "23.65")},
            "LCM-LoRA": {4: ("21.50", "40.38", "26.18")},
            "SDXL-Turbo": {4: ("22.58", "42.65", "26.18"), 1: ("23.71", "43.69", "26.36")},
        },
    ),
    Published(
        title="DMD2",
        source="arXiv 2405.14867: 10K prompts of COCO, SDXL at guidance 6",
        protocol="dmd2-coco10k",
        metrics=("fid_real", "patch_fid_real", "clip_score"),
        models={
            "SDXL": {100: ("19.36", "21.38", ".332")},
            "DMD2": {4: ("19.32", "20.86", ".332"), 1: ("19.01", "26.98", ".336")},
        },
        note="Its CLIP score is the cosine itself.",
    ),
    Published(
        title="DMD",
        source="arXiv 2311.18828: 30K prompts of COCO 2014, Stable Diffusion 1.5 at guidance 3",
        protocol="dmd-coco30k",
        metrics=("fid_real",),
        models={"DMD": {1: ("11.49",)}},
        note="Its teacher: 8.78.",
    ),
)


def published_beside(protocol: Protocol | None) -> tuple[Published, ...]:
    """Tables that are shown beside figures of a protocol's settings: its own; without one all."""
    return tuple(paper for paper in PUBLISHED if protocol in (None, paper.protocol))
