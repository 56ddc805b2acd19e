"""CLIP score (Hessel et al., arXiv 2104.08718): 100 times the cosine between a picture's and its prompt's embedding, unclipped.

The model is one of transformers' layout with safetensors: OpenAI's, or one of OpenCLIP's that the hub holds in that form too. A repository that has
OpenCLIP's own files alone (`open_clip_model.safetensors`) is refused by the names of its files, before any work.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from schemas.errors import BadInput
from stages.batching import in_batches
from stages.transformers_files import check_model_files

_BATCH: Final = 16
"""Pictures of one pass. Fixed, so that a score's last bit depends on nothing but pictures and prompts."""


@dataclass(frozen=True, eq=False)
class ClipScorer:
    """A CLIP model with its tokenizer and its preparation of pictures."""

    model: Any
    processor: Any
    device: str
    prompt_prefix: str = ""
    """Before every prompt, such as `A photo depicts ` (arXiv 2104.08718, section 3)."""

    @classmethod
    def load(cls, folder: Path, device: str, prompt_prefix: str) -> Self:
        """Read a model in transformers' layout. Raises `BadInput` where the folder holds none."""
        from transformers import CLIPModel, CLIPProcessor  # noqa: PLC0415  # seconds to import, needed by few recipes

        check_clip([path.name for path in folder.glob("*")], f"evaluate.clip_model {folder}")
        try:
            model: Any = CLIPModel.from_pretrained(folder, use_safetensors=True)
            processor = CLIPProcessor.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise BadInput(f"evaluate.clip_model {folder}: cannot be read as a CLIP model ({error})") from error
        return cls(model.eval().requires_grad_(False).to(device), processor, device, prompt_prefix)

    def scores(self, pictures: Iterable[NDArray[np.uint8]], prompts: Sequence[str]) -> NDArray[np.float32]:
        """(N,): score of every RGB picture (H, W, 3) with its prompt, cut to the model's length."""
        found: list[NDArray[np.float32]] = []
        for batch in in_batches(zip(pictures, prompts, strict=True), _BATCH):
            inputs = self.processor(
                images=[Image.fromarray(picture) for picture, _ in batch],
                text=[self.prompt_prefix + prompt for _, prompt in batch],
                padding="max_length",
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self.device)
            with torch.inference_mode():
                embedded = self.model(**inputs)
            cosine = (embedded.text_embeds.float() * embedded.image_embeds.float()).sum(dim=1)
            found.append(100 * cosine.cpu().numpy())
        return np.concatenate(found)


def check_clip(names: Iterable[str], where: str = "evaluate.clip_model") -> None:
    """Raise `BadInput` unless a folder's files, by `names`, are those of a CLIP model of transformers; `where` says which folder."""
    check_model_files(names, ("*processor_config.json", "tokenizer_config.json"), where, "a CLIP model")
