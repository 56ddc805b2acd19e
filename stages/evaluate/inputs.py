"""What the stage `evaluate` reads."""

from schemas.base import Model
from schemas.manifest import ImageShards, Latents, Manifest, ReferenceSet, Selection, StudentManifest, Teacher
from stages.evaluate.rows import Finetuned


class Inputs(Model):
    """What is evaluated, and against what."""

    teacher: Manifest[Teacher]
    latents: Manifest[Latents]
    """Its captions are the prompts where the recipe names no file."""
    images: Manifest[ImageShards]
    selection: Manifest[Selection]
    """Which of the images are the real ones to compare with."""
    students: dict[str, StudentManifest] = {}
    finetuned: dict[str, Finetuned] = {}
    """Bases and styles of `evaluate.transfer` that the recipe makes, by their run's name."""
    reference: Manifest[ReferenceSet] | None = None
    """Real images from elsewhere that take the place of the selection's."""
