"""One shard of pairs: its captions' text first, then batch after batch through the teacher's sampler."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from schemas.manifest import Latents, Manifest, Pairs, Teacher
from stages.batching import in_batches
from stages.diffusion.conditioning import Conditioning
from stages.kept_shards import INDEX
from stages.latents import LatentSet
from stages.pairs.draw import Drawer
from stages.parallel import OnePerProcess, worker_rank
from stages.workspace import Workspace

INDEX_SCHEMA: Final = pa.schema(
    [
        ("pair", pa.int64()),
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("sample", pa.int64()),  # of the encoded set, whose caption it is
        ("caption", pa.string()),
    ]
)


@dataclass(frozen=True, eq=False)
class Work:
    """What every process of a run needs to make any shard of it. Travels to them by pickle."""

    content: Pairs
    """What is made, as its manifest will say."""
    teacher: Manifest[Teacher]
    latents: Manifest[Latents]
    workspace: Workspace
    devices: tuple[str, ...]
    """Process number n works on device n modulo their number."""
    threads: int
    """Of torch on the CPU, the same in all processes: last bits depend on it."""

    def numbers(self, shard: int) -> range:
        """Pairs of a shard."""
        first = shard * self.content.shard_pairs
        return range(first, min(first + self.content.shard_pairs, self.content.pairs))


@dataclass(frozen=True, eq=False)
class Captions:
    """What some pairs are drawn from beside noise."""

    samples: list[int]
    """Of the encoded set."""
    captions: list[str]
    texts: Conditioning
    """On the CPU, without time ids."""
    unconditional: Conditioning
    """(1)."""


def shard_name(number: int) -> str:
    """Name of a shard and of the part that keeps it, without suffix."""
    return f"pairs-{number:05d}"


def draw_shard(number: int, work: Work) -> int:
    """Make one shard, keep it as a part, and return its number of pairs. Raises `RunFailed`, `CorruptArtifact`."""
    started = time.monotonic()
    drawer, pairs, name = loaded_drawer(work), work.numbers(number), shard_name(number)
    captions = captions_of(pairs, work)
    made = [
        drawer.draw([pairs[row] for row in rows], captions.texts[rows], captions.unconditional)
        for rows in in_batches(range(len(pairs)), work.content.batch_size)
    ]
    noise, outputs = (torch.cat(tensors) for tensors in zip(*made, strict=True))
    index = {
        "pair": list(pairs),
        "shard": [f"{name}.safetensors"] * len(pairs),
        "row": list(range(len(pairs))),
        "sample": captions.samples,
        "caption": captions.captions,
    }
    with work.workspace.folder("pairs") as folder:
        save_file({"noise": noise, "outputs": outputs}, folder / f"{name}.safetensors")
        pq.write_table(pa.table(index, INDEX_SCHEMA), folder / INDEX)
        work.workspace.save_part(name, folder, {"pairs": len(pairs), "seconds": time.monotonic() - started})
    return len(pairs)


def captions_of(pairs: range | list[int], work: Work) -> Captions:
    """The captions of some pairs. Of the encoded set only the shards that hold their text come to this machine, and they may leave it again.

    Text that is made on the fly is made before anything is drawn, so that the text encoders are gone from the device by then.
    """
    samples = [pair % work.latents.content.samples for pair in pairs]
    texts = LatentSet.open_texts(work.latents, work.workspace, work.teacher, samples)
    found = [texts.texts(batch).to("cpu") for batch in in_batches(samples, work.content.batch_size)]
    captions: Any = texts.captions.take(pa.array(samples)).to_pylist()
    made = Captions(samples, captions, Conditioning.cat(found), texts.unconditional(1))
    work.workspace.release(work.latents)
    return made


_drawer: OnePerProcess[Drawer] = OnePerProcess()
"""By the identity of what it works on."""


def loaded_drawer(work: Work) -> Drawer:
    """This process's teacher, loaded at its first shard."""

    def load() -> Drawer:
        torch.set_num_threads(work.threads)
        folder: Path = work.workspace.fetch(work.teacher)
        return Drawer(folder, work.content, work.devices[worker_rank() % len(work.devices)])

    return _drawer.get(work.workspace.identity, load)


def unload_drawer() -> None:
    """Let the teacher's memory go."""
    _drawer.clear()
