"""Which process this is among those that train together, which samples of the global batch are its own, and how they agree."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a workspace is made where nothing is trained too, and torch takes seconds
    from torch import Tensor

BUCKET_BYTES = 64 * 2**20
"""Gradients are averaged in pieces of about this size: large enough for the network, small enough beside the gradients themselves."""


@dataclass(frozen=True)
class Parallel:
    """One process of `world_size`. The global batch is the same for any number of processes; each takes its slice."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank}: expected 0 <= rank < world_size = {self.world_size}")

    def micro_batches(self, batch_size: int, accumulation_steps: int) -> list[range]:
        """Positions in the global batch of each micro-batch of this process: equal parts, in order.

        Raises `ValueError` unless world_size times accumulation_steps divides batch_size.
        """
        parts = self.world_size * accumulation_steps
        if batch_size % parts:
            raise ValueError(
                f"batch_size {batch_size}: expected a multiple of {self.world_size} processes times {accumulation_steps} accumulation steps"
            )
        size = batch_size // parts
        first = self.rank * accumulation_steps * size
        return [range(first + i * size, first + (i + 1) * size) for i in range(accumulation_steps)]

    @property
    def leads(self) -> bool:
        """Whether this process writes checkpoints, logs and artifacts for all."""
        return self.rank == 0

    def average_(self, tensors: "Iterable[Tensor]") -> None:
        """Replace tensors, the same list in every process, by their mean over all of them."""
        if self.world_size == 1:
            return
        import torch  # noqa: PLC0415
        from torch import distributed  # noqa: PLC0415

        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            distributed.all_reduce(flat)
            flat /= self.world_size
            parts = torch.split(flat, [tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)])

    def average_scalars(self, scalars: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """Mean of each scalar over all processes, on its device."""
        if self.world_size == 1 or not scalars:
            return dict(scalars)
        import torch  # noqa: PLC0415

        stacked = torch.stack([value.float() for value in scalars.values()])
        self.average_([stacked])
        return dict(zip(scalars, stacked.unbind(), strict=True))

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            from torch import distributed  # noqa: PLC0415

            distributed.barrier()


def _buckets(tensors: "Iterable[Tensor]") -> "Iterable[list[Tensor]]":
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
