"""Pictures of the encoded set, one for every image by its prompt: image-to-image rows start from them, a ControlNet's condition is their edges."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stages.diffusion.control import ControlledDenoiser, edges
from stages.diffusion.denoiser import Denoiser, UNetDenoiser
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.sampling import ImageStart
from stages.latents import LatentSet


@dataclass(frozen=True, eq=False)
class EncodedPictures:
    """The picture of every image of a row, and what it is for."""

    pipeline: TeacherPipeline
    latents: LatentSet
    chosen: Sequence[int]
    """Sample of the encoded set by image."""
    strength: float | None
    """Of image-to-image; None: sampling starts from noise alone."""
    controlnet: Any | None
    """ControlNetModel, conditioned on the pictures' edges."""
    controlnet_scale: float

    def start(self, images: Sequence[int]) -> ImageStart | None:
        """Where these images start; None from noise alone."""
        return None if self.strength is None else ImageStart(self._of(images), self.strength)

    def controlled(self, denoiser: Denoiser, images: Sequence[int]) -> Denoiser:
        """The denoiser with the ControlNet on these images' edges; itself without one."""
        if self.controlnet is None:
            return denoiser
        assert isinstance(denoiser, UNetDenoiser), "teacher and students of a pipeline are"
        return ControlledDenoiser(denoiser, self.controlnet, edges(self.pipeline.decode(self._of(images))), self.controlnet_scale)

    def _of(self, images: Sequence[int]) -> Tensor:
        """Latents (B, C, h, w) of the images' pictures."""
        latents, _ = self.latents.samples([self.chosen[image] for image in images])
        return latents.to(self.pipeline.device)


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
