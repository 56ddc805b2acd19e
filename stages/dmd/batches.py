"""What a step of distribution matching reads: captions, pairs of the teacher's noise and output, pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from stages.diffusion.conditioning import Conditioning
from stages.training.latent_batches import EncodedSet, LatentBatch


@dataclass(frozen=True, eq=False)
class PairBatch:
    """What the teacher's deterministic sampler makes of noise."""

    noise: Tensor
    """(B, C, h, w), unit variance."""
    outputs: Tensor
    """(B, C, h, w), scaled latents."""


@dataclass(frozen=True, eq=False)
class DmdBatch:
    """Samples of one step."""

    conditioning: Conditioning
    """Of what is generated; that of the pairs, where there are some."""
    shape: tuple[int, ...]
    """(C, h, w) of a latent."""
    pairs: PairBatch | None = None
    real: LatentBatch | None = None
    """Encoded pictures and their captions."""

    @property
    def reference(self) -> Tensor:
        """Latents that the generator's should be distributed like: the teacher's outputs, or else the pictures."""
        if self.pairs is not None:
            return self.pairs.outputs
        assert self.real is not None, "a batch has pairs or pictures"
        return self.real.latents

    def to(self, device: torch.device) -> "DmdBatch":
        """Move to the device."""
        pairs = None if self.pairs is None else PairBatch(self.pairs.noise.to(device), self.pairs.outputs.to(device))
        real = None if self.real is None else self.real.to(device)
        conditioning = real.conditioning if real is not None and pairs is None else self.conditioning.to(device)
        return replace(self, conditioning=conditioning, pairs=pairs, real=real)


class Pairs(Protocol):
    """Where pairs come from: `stages.pairs.pair_set.PairSet`, or a set a test makes up."""

    def __len__(self) -> int: ...

    def pairs(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Conditioning]:
        """Noise and outputs, each (B, C, h, w), and their conditioning."""
        ...


def batch_reader(latents: EncodedSet | None, pairs: Pairs | None) -> Callable[[Sequence[int]], DmdBatch]:
    """The loop's `read`: indices are the pairs', or where there are none the pictures'. With both a pair's number finds its picture, modulo."""

    def read(indices: Sequence[int]) -> DmdBatch:
        found: PairBatch | None = None
        real: LatentBatch | None = None
        conditioning: Conditioning | None = None
        if pairs is not None:
            noise, outputs, conditioning = pairs.pairs(indices)
            found = PairBatch(noise, outputs)
        if latents is not None:
            real = LatentBatch(*latents.samples([index % len(latents) for index in indices]))
        conditioning = conditioning if conditioning is not None or real is None else real.conditioning
        assert conditioning is not None, "pairs or pictures"
        shape = found.outputs.shape if found is not None else real.latents.shape  # type: ignore[union-attr]
        return DmdBatch(conditioning, tuple(shape[1:]), found, real)

    return read
