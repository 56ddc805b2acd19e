"""Which prompts are sampled, and which image has which: a function of the recipe alone."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from schemas.base import digest
from schemas.errors import BadInput


@dataclass(frozen=True)
class PromptSet:
    """The prompt of every image of a row."""

    images: tuple[str, ...]
    """Prompt of image i; its starting noise is a function of (seed, i)."""
    distinct: int
    source: Literal["file", "captions"]

    @property
    def digest(self) -> str:
        """SHA-256 over the prompts in order."""
        return digest(list(self.images))


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one a line, empty lines left out. Raises `BadInput` when it holds none or is no UTF-8 text."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"evaluate.prompts {path}: cannot be read ({error}); expected a UTF-8 text file, one prompt a line") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise BadInput(f"evaluate.prompts {path}: holds no prompt; expected one a line")
    return prompts


def seeded_order(captions: Sequence[str], seed: int) -> list[str]:
    """Distinct captions in an order that is a function of (seed, caption), so that one caption more moves no other. Empty ones are left out."""
    distinct = dict.fromkeys(caption.strip() for caption in captions if caption.strip())
    if not distinct:
        raise BadInput("evaluate.prompts: null asks for the captions of the encoded set, and it has none; expected a file of prompts")
    return sorted(distinct, key=lambda caption: hashlib.sha256(f"{seed}\n{caption}".encode()).digest())


def assign(prompts: Sequence[str], count: int, images_per_prompt: int, source: Literal["file", "captions"]) -> PromptSet:
    """Give `count` x `images_per_prompt` images their prompts: the first `count`, repeated from the start where there are fewer."""
    chosen = [prompts[number % len(prompts)] for number in range(count)]
    images = tuple(prompt for prompt in chosen for _ in range(images_per_prompt))
    return PromptSet(images, len(set(chosen)), source)
