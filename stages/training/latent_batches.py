"""What methods of text-to-image teachers share: batches of encoded samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stages.diffusion.conditioning import Conditioning


@dataclass(frozen=True, eq=False)
class LatentBatch:
    """Encoded samples."""

    latents: Tensor
    """(B, C, h, w), scaled."""
    conditioning: Conditioning

    def to(self, device: torch.device) -> "LatentBatch":
        """Move to the device."""
        return LatentBatch(self.latents.to(device, non_blocking=True), self.conditioning.to(device))


class EncodedSet(Protocol):
    """Where batches come from: `stages.latents.LatentSet`, or a set a test makes up."""

    def __len__(self) -> int: ...

    def samples(self, indices: Sequence[int]) -> tuple[Tensor, Conditioning]:
        """Latents (B, C, h, w) and their conditioning."""
        ...


def reader(latents: EncodedSet) -> Callable[[Sequence[int]], LatentBatch]:
    """The loop's `read` over an encoded set."""
    return lambda indices: LatentBatch(*latents.samples(indices))
