"""Reading a `latents` artifact: any samples in any order, straight from the mapped files."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from schemas.errors import BadInput, CorruptArtifact
from schemas.manifest import Latents, Manifest, Teacher
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.pipeline import TeacherPipeline
from stages.workspace import Workspace

_TEXT: Final = ("prompt_embeds", "pooled")
_COLUMNS: Final = ("shard", "row", "text_shard", "text_row")

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
        index = pq.read_table(folder / "index.parquet", columns=list(_COLUMNS), read_dictionary=["shard", "text_shard"])
        self._names, self._shard = _codes(index["shard"])
        self._row = index["row"].to_numpy()
        self._text_names, self._text_shard = _codes(index["text_shard"])
        self._text_row = index["text_row"].to_numpy()
        self._shards: dict[str, dict[str, Tensor]] = {}
        if len(self) != self.content.samples:
            raise CorruptArtifact(
                f"latents {manifest.identity[:12]}: its index has {len(self)} rows; its manifest says {self.content.samples}"
            )

    @classmethod
    def open(cls, manifest: Manifest[Latents], workspace: Workspace, teacher: Manifest[Teacher] | None = None) -> Self:
        """Fetch the artifact, verified, and open it. Raises `CorruptArtifact`.

        Where its text is made on the fly, the `teacher`'s text encoders are loaded onto the workspace's device; `BadInput` without one.
        """
        encode_text = None
        if manifest.content.text == "on_the_fly" and teacher is not None:
            encode_text = TeacherPipeline.load(workspace.fetch(teacher), workspace.device, only=frozenset({"text"})).encode_prompts
        return cls(workspace.fetch(manifest), manifest, encode_text)

    def __len__(self) -> int:
        return len(self._row)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.content.latent_shape

    @cached_property
    def captions(self) -> pa.ChunkedArray:
        """By sample. Read when they are first asked for: a gigabyte, where there are ten million."""
        return pq.read_table(self._folder / "index.parquet", columns=["caption"])["caption"].cast(pa.large_string())

    def samples(self, indices: Sequence[int]) -> tuple[Tensor, Conditioning]:
        """Return latents (B, C, h, w) and their conditioning, float32, in the order of `indices`, repeats allowed.

        They are on the CPU, but for text made on the fly, which is on the device of its encoders. Time ids are there for SDXL-type teachers only.
        Raises `IndexError` for an index outside the set.
        """
        chosen = np.asarray(indices, np.int64)
        outside = chosen[(chosen < 0) | (chosen >= len(self))]
        if len(outside):
            raise IndexError(f"sample {outside[0]}: expected 0 to {len(self) - 1}")
        own = self._gather(chosen, ("latents", "time_ids"), self._names, self._shard, self._row)
        text = self._text(chosen).with_time_ids(None)
        time_ids = own.get("time_ids")
        return own["latents"], text if time_ids is None else text.with_time_ids(time_ids.to(text.prompt_embeds.device))

    def unconditional(self, batch: int, time_ids: Tensor | None = None) -> Conditioning:
        """The conditioning of no text, `batch` times, with the given time ids (B, 6) or (1, 6)."""
        return self._unconditional.expand(batch).with_time_ids(time_ids)

    @cached_property
    def _unconditional(self) -> Conditioning:
        tensors = _mapped(self._folder / "unconditional.safetensors")
        return Conditioning(*(tensors[name].float() if name in tensors else None for name in _TEXT))  # type: ignore[arg-type]

    def _text(self, chosen: NDArray[np.int64]) -> Conditioning:
        if self._encode_text is not None:
            return self._encode_text(self.captions.take(pa.array(chosen)).to_pylist())
        gathered = self._gather(chosen, _TEXT, self._text_names, self._text_shard, self._text_row)
        return Conditioning(gathered["prompt_embeds"], gathered.get("pooled"))

    def _gather(
        self, chosen: NDArray[np.int64], tensors: Sequence[str], names: Sequence[str], shard_of: NDArray[Any], row_of: NDArray[Any]
    ) -> dict[str, Tensor]:
        """Rows of those `tensors` that the shards hold, shard by shard."""
        shards, rows = shard_of[chosen], row_of[chosen]
        gathered: dict[str, Tensor] = {}
        for shard in np.unique(shards):
            places = torch.from_numpy(np.flatnonzero(shards == shard))
            here = torch.from_numpy(rows[places.numpy()])
            held = self._tensors(names[shard])
            for name in tensors:
                if name in held:
                    whole = held[name]
                    if name not in gathered:
                        gathered[name] = torch.empty(len(chosen), *whole.shape[1:])
                    gathered[name][places] = whole[here].float()
        return gathered

    def _tensors(self, shard: str) -> Mapping[str, Tensor]:
        if shard not in self._shards:
            self._shards[shard] = _mapped(self._folder / shard)
        return self._shards[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}  # a process that is handed the set maps the files itself


def _codes(column: pa.ChunkedArray) -> tuple[list[str], NDArray[Any]]:
    """Distinct values of a column read as a dictionary, and by row which it is; -1 for null."""
    whole = column.unify_dictionaries().combine_chunks()
    array = whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole
    return array.dictionary.to_pylist(), array.indices.fill_null(-1).to_numpy()


def _mapped(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file over the mapped file: pages are read when they are touched."""
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a safetensors handle is no dict
