"""Which process this is among those that train together, and which samples of the global batch are its own."""

from dataclasses import dataclass


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
