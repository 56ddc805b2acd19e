"""The order of the data: a function of (seed, batch number), the same for any number of processes."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Generic, TypeVar

import torch
from torch import Tensor

from stages.ranks import Parallel
from stages.training.randomness import generator

B = TypeVar("B")


def indices(seed: int, number: int, batch_size: int, size: int) -> list[int]:
    """Samples of the global batch of a number (0, 1, ...), as indices into a set of `size` samples.

    Sample number n = number * batch_size + i of the whole run is entry n mod size of epoch n div size, and each epoch is a permutation of the
    set of its own. Batches go over an epoch's end, so no sample is left out.
    """
    first = number * batch_size
    return [int(_permutation(seed, sample // size, size)[sample % size]) for sample in range(first, first + batch_size)]


@lru_cache(maxsize=4)  # a batch reaches over two epochs at most, unless the set is smaller than the batch
def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    return torch.randperm(size, generator=generator(seed, "order", epoch))


class Batches(Generic[B]):
    """This process's micro-batches, step by step, the next step's read by a thread while this one's are computed with."""

    def __init__(
        self,
        read: Callable[[Sequence[int]], B],
        samples: int,
        *,
        seed: int,
        batch_size: int,
        accumulation_steps: int,
        parallel: Parallel,
        per_step: int = 1,
    ) -> None:
        """`per_step`: batches that a step takes, each of `batch_size`."""
        self.per_step = per_step
        self.read, self.samples, self.seed, self.batch_size = read, samples, seed, batch_size
        self.positions = parallel.micro_batches(batch_size, accumulation_steps)
        """Positions in the global batch, by micro-batch."""
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: dict[int, Future[list[list[B]]]] = {}

    def at(self, step: int, last: int) -> list[list[B]]:
        """Return the micro-batches of each batch of a step, and begin to read those of the next unless that is `last` or beyond."""
        arriving = self._ahead.pop(step, None) or self._reader.submit(self._read, step)
        if step + 1 < last:
            self._ahead[step + 1] = self._reader.submit(self._read, step + 1)
        return arriving.result()

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _read(self, step: int) -> list[list[B]]:
        numbers = range(step * self.per_step, (step + 1) * self.per_step)
        orders = [indices(self.seed, number, self.batch_size, self.samples) for number in numbers]
        return [[self.read(order[positions.start : positions.stop]) for positions in self.positions] for order in orders]
