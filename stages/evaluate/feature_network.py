"""A feature network of the FID, and what it finds in pictures."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.errors import BadInput
from stages.batching import in_batches

Pixels = NDArray[np.uint8]

FEATURE_BATCH: Final = 16
"""Images of one pass. Fixed, so that a feature's last bit depends on nothing but the images."""

INCEPTION_PX: Final = 299
"""Side of the pictures that Inception takes, and that clean-fid hands to any network."""


@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A function from (B, 3, side, side) float32 in 0..255 to (B, D) features, its weights loaded and frozen."""

    network: Callable[[Tensor], Tensor]
    title: str
    """What people call it; no place."""
    side_px: int = INCEPTION_PX

    def __call__(self, images: Tensor) -> Tensor:
        return self.network(images)


def features_of(pictures: Iterable[Pixels], network: FeatureNetwork, device: str) -> NDArray[np.float32]:
    """Features (N, D) of RGB pictures (H, W, 3), resized to the network's side as clean-fid does: bicubic, per channel, in float, not rounded."""
    from cleanfid.resize import make_resizer  # noqa: PLC0415  # an optional extra

    resize = make_resizer("PIL", False, "bicubic", (network.side_px, network.side_px))  # what its mode `clean` is at 299
    found: list[NDArray[np.float32]] = []
    for batch in in_batches(pictures, FEATURE_BATCH):
        resized = np.stack([resize(picture) for picture in batch]).transpose(0, 3, 1, 2)
        with torch.inference_mode():
            features = network(torch.from_numpy(np.ascontiguousarray(resized)).to(device))
        found.append(features.float().cpu().numpy())
    if not found:
        raise BadInput("features of no pictures at all; expected at least 2")
    return np.concatenate(found)
