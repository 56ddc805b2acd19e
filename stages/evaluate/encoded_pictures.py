"""Pictures that image-to-image rows start from: one of the encoded set for every image, by its prompt."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from schemas.errors import BadInput
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.sampling import ImageStart
from stages.evaluate.inputs import Inputs
from stages.evaluate.prompts import PromptSet
from stages.latents import LatentSet
from stages.workspace import Workspace


@dataclass(frozen=True, eq=False)
class EncodedPictures:
    """The picture of every image of a row."""

    latents: LatentSet
    chosen: Sequence[int]
    """Sample of the encoded set by image."""
    strength: float

    @classmethod
    def open(
        cls, inputs: Inputs, pipeline: TeacherPipeline, prompts: PromptSet, strength: float, *, seed: int, workspace: Workspace
    ) -> Self:
        """Choose from the encoded set. Raises `BadInput` where its pictures are not of the pipeline's own size."""
        if inputs.latents.content.latent_shape != pipeline.latent_shape:
            raise BadInput(
                f"evaluate.transfer strength: the latents are {inputs.latents.content.latent_shape}; expected the teacher's {pipeline.latent_shape}"
            )
        latents = LatentSet(workspace.fetch(inputs.latents), inputs.latents, pipeline.encode_prompts)
        return cls(latents, choose_pictures(prompts.images, latents.captions.to_pylist(), seed), strength)

    def start(self, images: Sequence[int], device: torch.device) -> ImageStart:
        """Where these images start."""
        latents, _ = self.latents.samples([self.chosen[image] for image in images])
        return ImageStart(latents.to(device), self.strength)


def choose_pictures(prompts: Sequence[str], captions: Sequence[str], seed: int) -> tuple[int, ...]:
    """Sample for each image: those with its prompt as caption in turn; where there is none, any, by (seed, image)."""
    by_caption: dict[str, list[int]] = {}
    for number, caption in enumerate(captions):
        by_caption.setdefault(caption.strip(), []).append(number)
    taken: dict[str, int] = {}
    chosen = []
    for image, prompt in enumerate(prompts):
        fitting = by_caption.get(prompt)
        if fitting is None:
            drawn = hashlib.sha256(f"picture/{seed}/{image}".encode()).digest()
            chosen.append(int.from_bytes(drawn[:8], "big") % len(captions))
        else:
            turn = taken[prompt] = taken.get(prompt, -1) + 1
            chosen.append(fitting[turn % len(fitting)])
    return tuple(chosen)
