"""Random numbers as a function of what they are for. Nothing random is ever saved: a resumed run draws the same numbers again."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Key = int | str


def derive_seed(seed: int, *key: Key) -> int:
    """Mix a seed and a key into 63 bits. Different keys give unrelated numbers; 1 and "1" are different keys."""
    text = "\0".join([str(seed), *(f"{type(part).__name__}:{part}" for part in key)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") & (2**63 - 1)


def generator(seed: int, *key: Key) -> torch.Generator:
    """Return a CPU generator that depends on (seed, key) only. CPU, so that every device sees the same numbers.

    torch's CPU generator keeps 32 bits of what it is seeded with: among millions of samples two may share their noise, which harms nothing.
    """
    return torch.Generator().manual_seed(derive_seed(seed, *key))


@dataclass(frozen=True)
class Draw:
    """The random numbers of some samples of one step.

    Each sample's numbers depend on (seed, key, the sample's position in the global batch, purpose), never on which process or accumulation
    step draws them: a batch gives the same result however it is cut. A purpose is drawn once; drawing it again gives the same numbers.
    """

    seed: int
    key: tuple[Key, ...]
    positions: Sequence[int]
    """Positions in the global batch of the samples at hand."""
    device: torch.device
    """Where the numbers are returned."""

    def fold(self, *key: Key) -> "Draw":
        """Return a source unrelated to this one, such as that of one player's turn."""
        return replace(self, key=(*self.key, *key))

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers (B, *shape), float32."""
        numbers = torch.empty(len(self.positions), *shape)
        for row, source in zip(numbers, self._sources(purpose), strict=True):
            row.normal_(generator=source)
        return self._moved(numbers)

    def uniform(self, purpose: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Numbers (B,) in [low, high), float32."""
        numbers = torch.empty(len(self.positions))
        for row, source in zip(numbers, self._sources(purpose), strict=True):
            row.uniform_(low, high, generator=source)
        return self._moved(numbers)

    def integers(self, purpose: str, high: int) -> Tensor:
        """Integers (B,) in [0, high), int64."""
        numbers = torch.empty(len(self.positions), dtype=torch.long)
        for row, source in zip(numbers, self._sources(purpose), strict=True):
            row.random_(0, high, generator=source)
        return self._moved(numbers)

    def shared_integer(self, purpose: str, high: int) -> int:
        """An integer in [0, high) that is the same for all samples of the step, in every process and micro-batch."""
        return int(torch.randint(high, (), generator=generator(self.seed, *self.key, purpose)))

    def _sources(self, purpose: str) -> Iterator[torch.Generator]:
        source = torch.Generator()
        for position in self.positions:
            yield source.manual_seed(derive_seed(self.seed, *self.key, position, purpose))

    def _moved(self, numbers: Tensor) -> Tensor:
        return numbers.to(self.device, non_blocking=True)


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Have torch choose kernels that give the same bits every time; where it has none it warns once. Restores the settings at the end."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is first used
    strict, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    benchmark, cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it would write every new tensor twice
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, cudnn
