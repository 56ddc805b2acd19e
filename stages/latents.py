"""Reading a `latents` artifact: any samples in any order, straight from the mapped files."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from torch import Tensor

from schemas.errors import CorruptArtifact
from schemas.manifest import Latents, Manifest
from stages.diffusion.conditioning import Conditioning
from stages.workspace import Workspace

_TEXT: Final = ("prompt_embeds", "pooled")


class LatentSet:
    """Samples 0 .. N-1 of an encoded set, in the order of `index.parquet`. Tensors stay on disk until they are asked for."""

    def __init__(self, folder: Path, manifest: Manifest[Latents]) -> None:
        self.content = manifest.content
        self._folder = folder
        index = pq.read_table(folder / "index.parquet", columns=["shard", "row", "caption"])
        self._shard: list[str] = index["shard"].to_pylist()
        self._row: list[int] = index["row"].to_pylist()
        self.captions: list[str] = index["caption"].to_pylist()
        """By sample."""
        self._shards: dict[str, dict[str, Tensor]] = {}
        if len(self) != self.content.samples:
            raise CorruptArtifact(
                f"latents {manifest.identity[:12]}: its index has {len(self)} rows; its manifest says {self.content.samples}"
            )

    @classmethod
    def open(cls, manifest: Manifest[Latents], workspace: Workspace) -> Self:
        """Fetch the artifact, verified, and open it. Raises `CorruptArtifact`."""
        return cls(workspace.fetch(manifest), manifest)

    def __len__(self) -> int:
        return len(self._row)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.content.latent_shape

    def samples(self, indices: Sequence[int]) -> tuple[Tensor, Conditioning]:
        """Return latents (B, C, h, w) and their conditioning, float32 on the CPU, in the order of `indices`, repeats allowed.

        Time ids are there for SDXL-type teachers only. Raises `IndexError` for an index outside the set.
        """
        by_shard: dict[str, list[int]] = {}
        for place, index in enumerate(indices):
            if not 0 <= index < len(self):
                raise IndexError(f"sample {index}: expected 0 to {len(self) - 1}")
            by_shard.setdefault(self._shard[index], []).append(place)
        gathered: dict[str, Tensor] = {}
        for shard, places in by_shard.items():
            rows = torch.tensor([self._row[indices[place]] for place in places])
            for name, whole in self._tensors(shard).items():
                if name not in gathered:
                    gathered[name] = torch.empty(len(indices), *whole.shape[1:])
                gathered[name][places] = whole[rows].float()
        conditioning = Conditioning(gathered["prompt_embeds"], gathered.get("pooled"), gathered.get("time_ids"))
        return gathered["latents"], conditioning

    def unconditional(self, batch: int, time_ids: Tensor | None = None) -> Conditioning:
        """The conditioning of no text, `batch` times, with the given time ids (B, 6) or (1, 6)."""
        return self._unconditional.expand(batch).with_time_ids(time_ids)

    @cached_property
    def _unconditional(self) -> Conditioning:
        tensors = _mapped(self._folder / "unconditional.safetensors")
        return Conditioning(*(tensors[name].float() if name in tensors else None for name in _TEXT))  # type: ignore[arg-type]

    def _tensors(self, shard: str) -> dict[str, Tensor]:
        if shard not in self._shards:
            self._shards[shard] = _mapped(self._folder / shard)
        return self._shards[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}  # a process that is handed the set maps the files itself


def _mapped(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file over the mapped file: pages are read when they are touched."""
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a safetensors handle is no dict
