"""Numbers of single pictures of a row: CLIP score, perceptual distances. Each is kept: neither a killed run nor a later evaluation looks at the
pictures again."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch

from infra.outside import file_names, local_copy
from schemas.dmd import RegressionConfig
from schemas.errors import BadInput
from schemas.evaluation import PERCEPTUAL, EvaluateConfig, PerceptualConfig
from stages.evaluate.metrics.catalogue import PICTURE_METRICS
from stages.evaluate.metrics.clip_score import ClipScorer, check_clip
from stages.evaluate.metrics.perceptual import Distance, diversity, paired
from stages.evaluate.past import samples_folder
from stages.evaluate.prompts import PromptSet
from stages.evaluate.row_sets import Numbers, RowSets
from stages.evaluate.samples import read_pictures
from stages.perceptual import build, check_packages
from stages.transformers_files import is_model_file
from stages.workspace import Workspace


class Singles:
    """What the recipe asks of single pictures, its networks loaded."""

    def __init__(
        self,
        config: EvaluateConfig,
        prompts: PromptSet,
        *,
        clip: ClipScorer | None,
        distance: Distance | None,
        device: str,
        outside: Mapping[str, str],
    ) -> None:
        """`outside`: digests of what lies outside, by the plan's names."""
        self.config, self.prompts, self.clip, self.distance, self.device, self.outside = config, prompts, clip, distance, device, outside

    @classmethod
    def open(cls, config: EvaluateConfig, prompts: PromptSet, workspace: Workspace, resolution: int) -> Self:
        """Load what is needed. Raises `BadInput` for a CLIP model or weights of the distance that cannot be had, and for a distance that pictures of
        `resolution` pixels are too small for."""
        clip = None
        if "clip_score" in config.metrics:
            folder = local_copy(workspace.outside["clip_model"], workspace.scratch, is_model_file)
            clip = ClipScorer.load(folder, workspace.device, config.clip_prefix)
        distance = None
        if PERCEPTUAL & set(config.metrics):
            place = workspace.outside.get("perceptual_vgg")
            distance = load_distance(config.perceptual, None if place is None else local_copy(place, workspace.scratch), workspace.device)
            _check_size(distance, resolution, config.perceptual, workspace.device)
        return cls(config, prompts, clip=clip, distance=distance, device=workspace.device, outside=workspace.lineage.inputs)

    def of_row(self, slug: str, reference: str, sets: RowSets) -> dict[str, Numbers]:
        """(N,) by the names among a row's scores. `slug` and `reference` name the row and the one of the same noise that it is held against, whose
        samples lie in the folder of `sets`."""
        samples, others = (samples_folder(sets.folder, name) for name in (slug, reference))
        found: dict[str, tuple[Callable[[], Numbers], dict[str, Any]]] = {}
        if (clip := self.clip) is not None:
            told: dict[str, Any] = {"model": self.outside.get("clip_model"), "prefix": self.config.clip_prefix}
            found["clip_score"] = (lambda: clip.scores(read_pictures(samples), self.prompts.images), told)
        if (distance := self.distance) is not None:
            vgg = self.outside.get("perceptual_vgg") if self.config.perceptual.vgg is not None else "torchvision's"
            by: dict[str, Any] = {"distance": self.config.perceptual.identity_fields(), "vgg": vgg}
            found["lpips_teacher"] = (
                lambda: paired(read_pictures(samples), read_pictures(others), distance, self.device),
                by | {"reference": sets.keys.get(reference)},
            )
            found["diversity"] = (
                lambda: diversity(read_pictures(samples), self.config.images_per_prompt, distance, self.device),
                by | {"images_per_prompt": self.config.images_per_prompt},
            )
        return {
            metric: sets.numbers(metric, slug, made_of | {"row": sets.keys.get(slug)}, make)
            for metric, (make, made_of) in found.items()
            if PICTURE_METRICS[metric][0] in self.config.metrics
        }


def load_distance(config: PerceptualConfig, vgg: Path | None, device: str) -> Distance:
    """The perceptual distance; `vgg` is the file of its weights on this machine. Raises `BadInput`."""
    distance: Distance = build(_as_regression(config), vgg, "evaluate.perceptual").to(device)
    return distance


def _check_size(distance: Distance, resolution: int, config: PerceptualConfig, device: str) -> None:
    blank = torch.zeros(1, 3, resolution, resolution, device=device)
    try:
        with torch.inference_mode():
            distance(blank, blank)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a kernel larger than what is left of the picture
        side = config.size_px or resolution
        raise BadInput(f"evaluate.perceptual.size_px: {side} px are too few for {config.distance} ({error}); expected more") from error


def check_singles(config: EvaluateConfig, outside: Mapping[str, str]) -> None:
    """Look for packages, and at the names of a CLIP model's files, wherever they are. Raises `BadInput`."""
    if PERCEPTUAL & set(config.metrics):
        check_packages(_as_regression(config.perceptual), "evaluate.perceptual")
    if (clip := outside.get("clip_model")) is not None:
        check_clip(file_names(clip), f"evaluate.clip_model {clip}")


def _as_regression(config: PerceptualConfig) -> RegressionConfig:
    return RegressionConfig(distance=config.distance, vgg=config.vgg, size_px=config.size_px)
