"""Trainable values of the published networks' adapters: built from their configurations on the meta device, shapes only."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from stages.diffusion.lora import lora_config
from tests.architectures import SD15, SDXL, SSD_1B


@pytest.mark.parametrize(
    ("network", "values", "trainable"),
    [
        # LCM-LoRA (arXiv 2311.05556) names 67.5 M, 105 M and 197 M: rank 64 on these layers gives the last two to their last digit. SD1.5's is .25 M
        # less than named: with conv_in and conv_out, which diffusers' scripts leave out as we do, it would be 67.46 M (and the others 105 and 197 M).
        (SD15, 859_520_964, 67_252_224),
        (SSD_1B, 1_331_334_404, 104_902_656),
        (SDXL, 2_567_463_684, 196_751_360),
    ],
)
def test_adapters_are_as_large_as_published(network: dict[str, Any], values: int, trainable: int) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**network)
        assert sum(parameter.numel() for parameter in unet.parameters()) == values
        unet.add_adapter(lora_config(64, 64))
    assert sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad) == trainable
