"""Maps over processes for work that is bound by Python or by libraries that hold its lock. Results come in the order of the items."""

import gc
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from multiprocessing.sharedctypes import Synchronized
from typing import Final, Generic, TypeVar

from schemas.errors import RunFailed

logger = logging.getLogger(__name__)

_AHEAD: Final = 3
"""Items of `stream_processes` begun ahead for each process, so that none waits while the caller keeps a result or fetches an item."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_processes(function: Callable[[Item], Result], items: Sequence[Item], processes: int) -> Iterator[Result]:
    """Yield `function(item)` for every item in order, worked on by up to `processes` spawned processes (one: in this one).

    `function` is a module's function (or a `functools.partial` of one) and everything travels by pickle between our own processes. Raises what it
    raises, and `RunFailed` when a process was killed, for instance for want of memory.
    """
    workers = min(processes, len(items))
    if workers <= 1:
        yield from map(function, items)
        return
    pool = _pool(workers)
    try:
        yield from pool.map(function, items)
    except BrokenProcessPool as error:
        raise _died(function) from error
    finally:
        pool.shutdown(cancel_futures=True)


def stream_processes(function: Callable[[Item], Result], items: Iterable[Item], processes: int) -> Iterator[tuple[Item, Result]]:
    """Yield (item, `function(item)`) in order, like `map_processes`, taking items one by one as processes come free: they may be without end."""
    if processes <= 1:
        yield from ((item, function(item)) for item in items)
        return
    pool = _pool(processes)
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > _AHEAD * processes:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    except BrokenProcessPool as error:
        raise _died(function) from error
    finally:
        pool.shutdown(cancel_futures=True)


def devices_of(device: str, processes: int, field: str) -> tuple[str, ...]:
    """One device for each process: all that `cuda` has, as far as there are processes for them; else the one that is named.

    `field` is the recipe's, for the warning where there are more processes than devices.
    """
    if device != "cuda" or processes == 1:
        return (device,)
    import torch  # noqa: PLC0415 - seconds, and maps without networks do not need it

    found = torch.cuda.device_count()
    if processes > found:
        logger.warning("%s = %d: this machine has %d CUDA device(s), and each gets one process", field, processes, found)
    return tuple(f"cuda:{number}" for number in range(min(found, processes)))


class OnePerProcess(Generic[Result]):
    """What a process makes once for many items of a map, such as a loaded network: the one that was last asked for."""

    def __init__(self) -> None:
        self._held: dict[str, Result] = {}

    def get(self, key: str, make: Callable[[], Result]) -> Result:
        """The one of that key, made where it is not the one that is held."""
        if key not in self._held:
            self._held.clear()
            self._held[key] = make()
        return self._held[key]

    def clear(self) -> None:
        """Let it go, and the memory of devices with it."""
        import torch  # noqa: PLC0415

        self._held.clear()
        gc.collect()
        torch.cuda.empty_cache()  # nothing, where there is no CUDA


def _pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(context.Value("i", 0),))


def _died(function: Callable[..., object]) -> RunFailed:
    return RunFailed(f"a worker process died while running {function}: was it killed for want of memory? Try fewer processes")


def worker_rank() -> int:
    """Which of a map's processes this is, from 0 on; 0 in a process that is none. Tells each its own device."""
    return _rank


_rank = 0


def _begin(started: "Synchronized[int]") -> None:
    global _rank  # noqa: PLW0603 - a process has one
    with started.get_lock():
        _rank = started.value
        started.value += 1
    belong_to_parent()


def belong_to_parent() -> None:
    """Die with the parent, however it dies: a worker waiting for work would never notice. Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()
