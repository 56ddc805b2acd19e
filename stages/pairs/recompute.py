"""Some pairs of an artifact drawn again, and held against what it holds."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from infra.store import ArtifactStore
from schemas.errors import CorruptArtifact
from schemas.manifest import Manifest, Pairs
from stages.pairs.draw import Drawer, pair_noise
from stages.pairs.pair_set import PairSet, teacher_of
from stages.workspace import Workspace

_TOLERANCE: Final = {"float32": 1e-3, "bfloat16": 0.1}
"""Norm of the difference over the norm of the output. On the device that drew them, and by as many threads, outputs have equal bits; other kernels
round otherwise, and 50 guided steps enlarge it. Other text, guidance, noise or weights move an output by a multiple of that."""


@dataclass(frozen=True)
class Recomputed:
    """Pairs that were drawn again and agree."""

    pairs: tuple[int, ...]
    largest: float
    """Relative difference of the outputs; 0 where all have equal bits."""


def recompute(manifest: Manifest[Pairs], store: ArtifactStore, count: int, device: str = "cpu") -> Recomputed:
    """Draw `count` pairs again, spread evenly over all, each with those it was drawn with, and compare them.

    Noise must have equal bits. Raises `CorruptArtifact` naming the first pair that differs, and `BadInput` where the teacher or the encoded set is
    not on the store any more.
    """
    content = manifest.content
    chosen = spread(count, content.pairs)
    largest = 0.0
    with tempfile.TemporaryDirectory(prefix="distill-recompute-") as scratch:
        workspace = Workspace(store, manifest.identity, manifest.lineage, Path(scratch), device=device)
        pairs = PairSet.open(manifest, workspace)
        drawer = Drawer(workspace.fetch(teacher_of(manifest, workspace)), content, device)
        for batch in dict.fromkeys(drawn_with(content, pair) for pair in chosen):
            wanted = [pair for pair in chosen if pair in batch]
            noise, outputs, conditioning = pairs.pairs(batch)
            _, again = drawer.draw(batch, conditioning.with_time_ids(None), pairs.unconditional(1))
            for pair in wanted:
                row = batch.index(pair)
                what = f"pairs {manifest.identity[:12]}: pair {pair}"
                if not torch.equal(noise[row], pair_noise(content.seed, [pair], content.latent_shape)[0]):
                    raise CorruptArtifact(
                        f"{what} differs when it is drawn again: its noise is not that of seed {content.seed}", manifest.identity
                    )
                difference = float((again[row] - outputs[row]).norm() / again[row].norm())
                if not difference <= _TOLERANCE[content.precision]:
                    raise CorruptArtifact(
                        f"{what} differs when it is drawn again: its output by {difference:.3g} of its norm; expected at most "
                        f"{_TOLERANCE[content.precision]:g}",
                        manifest.identity,
                    )
                largest = max(largest, difference)
    return Recomputed(chosen, largest)


def spread(count: int, pairs: int) -> tuple[int, ...]:
    """Numbers of `count` pairs of so many, evenly spread, the first and the last among them; all where there are no more."""
    if count >= pairs:
        return tuple(range(pairs))
    return tuple(round(i * (pairs - 1) / max(1, count - 1)) for i in range(count))


def drawn_with(content: Pairs, pair: int) -> range:
    """The pairs of the batch in which a pair was drawn."""
    shard = range(pair - pair % content.shard_pairs, content.pairs)[: content.shard_pairs]
    first = (pair - shard.start) // content.batch_size * content.batch_size
    return shard[first : first + content.batch_size]
