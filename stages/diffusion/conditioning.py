"""What a denoiser is conditioned on beside x_t and t: text embeddings, pooled text, SDXL's size and crop."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Conditioning of a batch. Teachers without pooled text or micro-conditioning (SD1.5, SD2.x) leave those None."""

    prompt_embeds: Tensor
    """(B, L, F)."""
    pooled: Tensor | None = None
    """(B, P), of the second text encoder only."""
    time_ids: Tensor | None = None
    """(B, 6) pixels: original height and width, crop top and left, target height and width (SDXL, arXiv 2307.01952, 2.2)."""
    guidance_w: Tensor | None = None
    """(B,) LCM-convention scale w, for a network that is told it (LCM, arXiv 2310.04378, 4.2). On whichever device it was made."""

    @property
    def batch(self) -> int:
        """B."""
        return len(self.prompt_embeds)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move all tensors; change the type of the embeddings. Time ids and w keep theirs: bfloat16 has no 1023."""
        moved = self._map(lambda tensor: tensor.to(device=device, dtype=dtype))
        kept = {name: value.to(device=device) for name in ("time_ids", "guidance_w") if (value := getattr(self, name)) is not None}
        return replace(moved, **kept)

    def with_time_ids(self, time_ids: Tensor | None) -> Self:
        """The same text with other time ids, (B, 6) or (1, 6) for all; None takes them away."""
        if time_ids is not None and len(time_ids) != self.batch:
            time_ids = time_ids.expand(self.batch, -1)
        return replace(self, time_ids=time_ids)

    def with_guidance(self, w: Tensor | float | None) -> Self:
        """The same with another w to tell the network, (B,) or one for all; None takes it away."""
        if isinstance(w, float):
            w = torch.full((self.batch,), w)
        return replace(self, guidance_w=w)

    def expand(self, batch: int) -> Self:
        """Repeat a conditioning of batch 1 `batch` times (no copy)."""
        return self._map(lambda tensor: tensor.expand(batch, *tensor.shape[1:]))

    def where(self, keep: Tensor, other: "Conditioning") -> "Conditioning":
        """The text of the samples that `keep` (B,) is true for, the other's text for the rest; all time ids stay."""
        pooled = self.pooled
        if pooled is not None and other.pooled is not None:
            pooled = torch.where(keep[:, None], pooled, other.pooled)
        return Conditioning(torch.where(keep[:, None, None], self.prompt_embeds, other.prompt_embeds), pooled, self.time_ids)

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> Self:
        """Part of the batch; an integer keeps the batch dimension, with size 1."""
        if isinstance(index, int):
            index = slice(index, index + 1) if index != -1 else slice(index, None)
        return self._map(lambda tensor: tensor[index])

    @staticmethod
    def cat(parts: "Sequence[Conditioning]") -> "Conditioning":
        """Concatenate batches. Raises `ValueError` when only some have pooled text, time ids or w."""
        return Conditioning(
            torch.cat([part.prompt_embeds for part in parts]),
            _cat_optional([part.pooled for part in parts], "pooled"),
            _cat_optional([part.time_ids for part in parts], "time_ids"),
            _cat_optional([part.guidance_w for part in parts], "guidance_w"),
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(
            change(self.prompt_embeds),
            None if self.pooled is None else change(self.pooled),
            None if self.time_ids is None else change(self.time_ids),
            None if self.guidance_w is None else change(self.guidance_w),
        )


def blank_text(unet_config: Mapping[str, Any], tokens: int, batch: int) -> Conditioning:
    """Text of zeros, of the shapes that a UNet of this configuration takes, without time ids."""
    text = torch.zeros(batch, tokens, unet_config["cross_attention_dim"])
    if unet_config.get("addition_embed_type") != "text_time":
        return Conditioning(text)
    return Conditioning(
        text, torch.zeros(batch, unet_config["projection_class_embeddings_input_dim"] - 6 * unet_config["addition_time_embed_dim"])
    )


def _cat_optional(parts: Sequence[Tensor | None], name: str) -> Tensor | None:
    present = [part for part in parts if part is not None]
    if not present:
        return None
    if len(present) != len(parts):
        raise ValueError(f"{name}: given for {len(present)} of {len(parts)} conditionings; expected all or none")
    return torch.cat(present)
