"""Perceptual distances of single pictures: to the teacher's of the same prompt and noise, and among those of one prompt."""

from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.errors import BadInput
from stages.batching import in_batches

Pixels = NDArray[np.uint8]
Distance = Callable[[Tensor, Tensor], Tensor]
"""From RGB pictures (B, 3, H, W) in -1..1 and others to (B,), such as LPIPS (arXiv 1801.03924)."""

_BATCH: Final = 16
"""Pairs of one pass. Fixed, so that a distance's last bit depends on nothing but the pictures."""


def paired(pictures: Iterable[Pixels], others: Iterable[Pixels], distance: Distance, device: str) -> NDArray[np.float32]:
    """(N,): distance of every picture (H, W, 3) to the other of its place. Raises `ValueError` where there are not as many."""
    return _distances(zip(pictures, others, strict=True), distance, device)


def diversity(pictures: Iterable[Pixels], images_per_prompt: int, distance: Distance, device: str) -> NDArray[np.float32]:
    """(N,): mean distance of every picture to the others of its prompt, which lie side by side. The mean of these is that of all pairs of a prompt,
    over prompts: DMD2's diversity (arXiv 2405.14867). Raises `BadInput` for a prompt of a single picture."""
    if images_per_prompt < 2:
        raise BadInput(f"diversity of {images_per_prompt} image(s) of a prompt; expected at least 2")
    pairs = list(combinations(range(images_per_prompt), 2))

    def side_by_side() -> Iterator[tuple[Pixels, Pixels]]:
        for group in in_batches(pictures, images_per_prompt):
            yield from ((group[one], group[two]) for one, two in pairs)

    of_pairs = _distances(side_by_side(), distance, device).reshape(-1, len(pairs))
    means = np.zeros((len(of_pairs), images_per_prompt), np.float32)
    for column, pair in enumerate(pairs):
        for place in pair:
            means[:, place] += of_pairs[:, column] / (images_per_prompt - 1)
    return means.reshape(-1)


def _distances(pairs: Iterable[tuple[Pixels, Pixels]], distance: Distance, device: str) -> NDArray[np.float32]:
    found: list[NDArray[np.float32]] = []
    for batch in in_batches(pairs, _BATCH):
        first, second = (_tensor([pair[side] for pair in batch], device) for side in (0, 1))
        with torch.inference_mode():
            found.append(distance(first, second).float().cpu().numpy())
    return np.concatenate(found)


def _tensor(pictures: list[Pixels], device: str) -> Tensor:
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(device)
    return stacked.float() / 127.5 - 1
