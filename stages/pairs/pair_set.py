"""Reading a `pairs` artifact: any pairs in any order, straight from the mapped files."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from schemas.errors import BadInput, CorruptArtifact
from schemas.manifest import Latents, Manifest, Pairs, Teacher
from stages.diffusion.conditioning import Conditioning
from stages.kept_shards import INDEX
from stages.latents import LatentSet
from stages.mapped_shards import MappedShards, Places, checked_indices
from stages.pairs.draw import time_ids_of
from stages.workspace import Workspace


class PairSet:
    """Pairs 0 .. N-1. What the teacher drew can be trained on in the place of encoded pictures: it is an `EncodedSet`.

    Only `texts` know the captions' embeddings; they are those of the encoded set that the pairs were drawn with.
    """

    def __init__(self, folder: Path, manifest: Manifest[Pairs], texts: LatentSet) -> None:
        """`folder` holds the artifact's files, `texts` the encoded set that it names. Raises `CorruptArtifact`."""
        self.content = manifest.content
        self._folder, self._texts = folder, texts
        index = pq.read_table(folder / INDEX, columns=["pair", "shard", "row", "sample"], read_dictionary=["shard"])
        self._places = Places.of(index, "shard", "row")
        self._sample = index["sample"].to_numpy()
        self._files = MappedShards(folder)
        if not np.array_equal(index["pair"].to_numpy(), np.arange(self.content.pairs)):
            raise CorruptArtifact(f"pairs {manifest.identity[:12]}: its index does not list pairs 0 to {self.content.pairs - 1} in order")

    @classmethod
    def open(cls, manifest: Manifest[Pairs], workspace: Workspace) -> Self:
        """Fetch the artifact, verified, and of the encoded set that it names what holds its captions' embeddings.

        Where that set's text is made on the fly, the teacher's text encoders are loaded onto the workspace's device. Raises `CorruptArtifact`, and
        `BadInput` where the encoded set, or the teacher that is needed for it, is not on the store any more.
        """
        folder = workspace.fetch(manifest)
        latents = encoded_set(manifest, workspace)
        teacher = teacher_of(manifest, workspace) if latents.content.text == "on_the_fly" else None
        samples = range(min(manifest.content.pairs, latents.content.samples))
        return cls(folder, manifest, LatentSet.open_texts(latents, workspace, teacher, samples))

    def __len__(self) -> int:
        return self.content.pairs

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.content.latent_shape

    @cached_property
    def captions(self) -> pa.ChunkedArray:
        """By pair. Read when they are first asked for."""
        return pq.read_table(self._folder / INDEX, columns=["caption"])["caption"].cast(pa.large_string())

    def pairs(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Conditioning]:
        """Return noise (B, C, h, w), outputs (B, C, h, w) and conditioning, float32, on the CPU, in the order of `indices`, repeats allowed.

        Time ids, those the teacher was told, are there for SDXL-type teachers only. Raises `IndexError` for an index outside the set.
        """
        chosen = checked_indices(indices, len(self), "pair")
        held = self._files.gather(self._places, chosen, ("noise", "outputs"))
        text = self._texts.texts(self._sample[chosen].tolist()).to("cpu")
        return held["noise"], held["outputs"], text.with_time_ids(time_ids_of(self.content))

    def samples(self, indices: Sequence[int]) -> tuple[Tensor, Conditioning]:
        """Return outputs (B, C, h, w) and their conditioning, as `pairs` does."""
        _, outputs, conditioning = self.pairs(indices)
        return outputs, conditioning

    def unconditional(self, batch: int, time_ids: Tensor | None = None) -> Conditioning:
        """The conditioning of no text, `batch` times, with the given time ids (B, 6) or (1, 6)."""
        return self._texts.unconditional(batch, time_ids)


def encoded_set(pairs: Manifest[Pairs], workspace: Workspace) -> Manifest[Latents]:
    """The encoded set whose captions the pairs were drawn with. Raises `BadInput` when it is not on the store any more."""
    found = workspace.store.find(pairs.content.latents)
    if found is None or not isinstance(found.content, Latents):
        raise BadInput(
            f"pairs {pairs.identity[:12]}: the encoded set {pairs.content.latents[:12]}, whose text they were drawn with, is not on "
            f"{workspace.store.address}; expected it there: run distill stage encode"
        )
    return found  # type: ignore[return-value]


def teacher_of(pairs: Manifest[Pairs], workspace: Workspace) -> Manifest[Teacher]:
    """The teacher that drew the pairs. Raises `BadInput` when it is not on the store any more."""
    found = workspace.store.find(pairs.content.teacher)
    if found is None or not isinstance(found.content, Teacher):
        raise BadInput(
            f"pairs {pairs.identity[:12]}: the teacher {pairs.content.teacher[:12]}, which drew them, is not on {workspace.store.address}; "
            "expected it there: run distill stage teacher"
        )
    return found  # type: ignore[return-value]
