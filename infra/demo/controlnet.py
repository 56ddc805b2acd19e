"""A ControlNet for the demo's teacher, as training one would begin: what follows edges has still to be learnt."""

import json
import shutil
from pathlib import Path
from typing import Any, Final

TEACHER: Final = Path(__file__).resolve().parents[2] / "recipes" / "tiny_teacher"
"""In a checkout of the project."""


def write_controlnet(folder: Path, teacher: Path = TEACHER) -> Path:
    """Write, unless it is there, a ControlNet initialised from a pipeline's UNet (arXiv 2302.05543): a copy of its encoder, whose outputs go through
    convolutions that begin at zero. So it adds nothing yet. Equal UNets give equal bytes."""
    if folder.is_dir():
        return folder
    import torch  # noqa: PLC0415 - seconds to import, and of the demos one needs it

    from infra.torchvision_ops import define_missing_ops  # noqa: PLC0415

    define_missing_ops()
    from diffusers import ControlNetModel, UNet2DConditionModel  # noqa: PLC0415

    unet_class: Any = UNet2DConditionModel
    unet = unet_class.from_pretrained(teacher / "unet", use_safetensors=True)
    halvings = len(json.loads((teacher / "vae" / "config.json").read_text(encoding="utf-8"))["block_out_channels"]) - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # of the pictures' way down to the latents' size, a stride of two after each but the last
        widths = (16, *(32 for _ in range(halvings)))
        controlnet: Any = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths)
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    controlnet.save_pretrained(fresh, safe_serialization=True)
    fresh.rename(folder)
    return folder
