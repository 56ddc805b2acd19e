"""Reading a `latents` artifact: any samples in any order, straight from the mapped files."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import Tensor

from schemas.errors import BadInput, CorruptArtifact
from schemas.manifest import Latents, Manifest, Teacher
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.pipeline import TeacherPipeline
from stages.mapped_shards import MappedShards, Places, checked_indices, mapped
from stages.workspace import Workspace

_INDEX: Final = "index.parquet"
_UNCONDITIONAL: Final = "unconditional.safetensors"
_TEXT: Final = ("prompt_embeds", "pooled")

EncodeText = Callable[[Sequence[str]], Conditioning]
"""From captions to their conditioning, without time ids."""


class LatentSet:
    """Samples 0 .. N-1 of an encoded set, in the order of `index.parquet`. Tensors stay on disk until they are asked for."""

    def __init__(self, folder: Path, manifest: Manifest[Latents], encode_text: EncodeText | None = None) -> None:
        """`encode_text` makes the conditioning of a set whose text is made on the fly. Raises `CorruptArtifact`, and `BadInput` where it lacks."""
        self.content = manifest.content
        self._folder = folder
        self._encode_text = encode_text
        if self.content.text == "on_the_fly" and encode_text is None:
            raise BadInput(
                f"latents {manifest.identity[:12]}: hold no text embeddings (encode.text: on_the_fly); expected a teacher to make them"
            )
        self._places, self._texts = _places(folder)
        self._files = MappedShards(folder)
        if len(self) != self.content.samples:
            raise CorruptArtifact(
                f"latents {manifest.identity[:12]}: its index has {len(self)} rows; its manifest says {self.content.samples}"
            )

    @classmethod
    def open(cls, manifest: Manifest[Latents], workspace: Workspace, teacher: Manifest[Teacher] | None = None) -> Self:
        """Fetch the artifact, verified, and open it. Raises `CorruptArtifact`.

        Where its text is made on the fly, the `teacher`'s text encoders are loaded onto the workspace's device; `BadInput` without one.
        """
        return cls(workspace.fetch(manifest), manifest, _text_encoder(manifest, workspace, teacher))

    @classmethod
    def open_texts(
        cls, manifest: Manifest[Latents], workspace: Workspace, teacher: Manifest[Teacher] | None, indices: Sequence[int]
    ) -> Self:
        """As `open`, for the texts of the samples `indices` alone: of the shards only those come to this machine that hold one of them."""
        folder = workspace.fetch(manifest, [_INDEX, _UNCONDITIONAL])
        _, texts = _places(folder)
        shards = texts.shards(checked_indices(indices, len(texts), "sample"))
        workspace.fetch(manifest, shards)
        return cls(folder, manifest, _text_encoder(manifest, workspace, teacher))

    def __len__(self) -> int:
        return len(self._places)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.content.latent_shape

    @cached_property
    def captions(self) -> pa.ChunkedArray:
        """By sample. Read when they are first asked for: a gigabyte, where there are ten million."""
        return pq.read_table(self._folder / _INDEX, columns=["caption"])["caption"].cast(pa.large_string())

    def samples(self, indices: Sequence[int]) -> tuple[Tensor, Conditioning]:
        """Return latents (B, C, h, w) and their conditioning, float32, in the order of `indices`, repeats allowed.

        They are on the CPU, but for text made on the fly, which is on the device of its encoders. Time ids are there for SDXL-type teachers only.
        Raises `IndexError` for an index outside the set.
        """
        chosen = checked_indices(indices, len(self), "sample")
        own = self._files.gather(self._places, chosen, ("latents", "time_ids"))
        text = self._text(chosen)
        time_ids = own.get("time_ids")
        return own["latents"], text if time_ids is None else text.with_time_ids(time_ids.to(text.prompt_embeds.device))

    def texts(self, indices: Sequence[int]) -> Conditioning:
        """The conditioning of the samples' captions without time ids, float32, where that of `samples` is. Raises `IndexError`."""
        return self._text(checked_indices(indices, len(self), "sample"))

    def unconditional(self, batch: int, time_ids: Tensor | None = None) -> Conditioning:
        """The conditioning of no text, `batch` times, with the given time ids (B, 6) or (1, 6)."""
        return self._unconditional.expand(batch).with_time_ids(time_ids)

    @cached_property
    def _unconditional(self) -> Conditioning:
        tensors = mapped(self._folder / _UNCONDITIONAL)
        return Conditioning(*(tensors[name].float() if name in tensors else None for name in _TEXT))  # type: ignore[arg-type]

    def _text(self, chosen: NDArray[np.int64]) -> Conditioning:
        if self._encode_text is not None:
            return self._encode_text(self.captions.take(pa.array(chosen)).to_pylist()).with_time_ids(None)
        gathered = self._files.gather(self._texts, chosen, _TEXT)
        return Conditioning(gathered["prompt_embeds"], gathered.get("pooled"))


def _places(folder: Path) -> tuple[Places, Places]:
    """Of the samples, and of their captions' embeddings."""
    columns = ["shard", "row", "text_shard", "text_row"]
    index = pq.read_table(folder / _INDEX, columns=columns, read_dictionary=["shard", "text_shard"])
    return Places.of(index, "shard", "row"), Places.of(index, "text_shard", "text_row")


def _text_encoder(manifest: Manifest[Latents], workspace: Workspace, teacher: Manifest[Teacher] | None) -> EncodeText | None:
    """What makes text that is not stored."""
    if manifest.content.text != "on_the_fly" or teacher is None:
        return None
    return TeacherPipeline.load(workspace.fetch(teacher), workspace.device, only=frozenset({"text"})).encode_prompts
