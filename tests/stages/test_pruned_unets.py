"""A UNet pruned as SSD-1B's: no attention in the middle, another number of transformer blocks in every layer."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from schemas.lcm import LcmConfig
from stages import lcm
from stages.diffusion.lora import LORA_FILE
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.sampling import image_generator
from stages.students import load_student
from tests.architectures import SSD_1B
from tests.tiny_pipelines import build
from tests.training import artifacts


def test_the_tiny_one_is_pruned_where_ssd_1b_is() -> None:
    config = build("ssd-1b").unet.config
    assert config.mid_block_type == SSD_1B["mid_block_type"]
    for name in ("transformer_layers_per_block", "reverse_transformer_layers_per_block"):
        assert any(isinstance(block, list | tuple) for block in config[name]) and any(isinstance(block, list) for block in SSD_1B[name])
    names = [name for name, _ in build("ssd-1b").unet.named_modules()]
    assert "mid_block.resnets.0" in names and not any(name.startswith("mid_block.attentions.0") for name in names)


@pytest.mark.parametrize("network", ["lora", "unet"])
def test_it_is_loaded_trained_and_its_student_is_drawn_by_plain_diffusers(tmp_path: Path, network: str) -> None:
    teacher = artifacts.make_teacher(tmp_path, "ssd-1b")
    latents = artifacts.make_latents(tmp_path, teacher)
    known = {"training_steps": 2, "batch_size": 2, "warmup_steps": 0, "lora_rank": 2, "lora_alpha": 3, "steps": (2,), "network": network}
    config = LcmConfig.model_validate(known | {"optimizer": {"learning_rate": 1e-2}})
    made = lcm.run(config, lcm.Inputs(teacher=teacher, latents=latents), artifacts.workspace(tmp_path, config=config))

    store = artifacts.open_store(tmp_path)
    folder = store.fetch(made)
    pipeline = TeacherPipeline.load(store.fetch(teacher))
    denoiser = load_student(pipeline, made, folder)

    plain: Any = diffusers.DiffusionPipeline.from_pretrained(store.fetch(teacher))
    x, t = torch.randn(1, *pipeline.latent_shape), torch.tensor([499])
    with torch.no_grad():
        before = plain.unet(x, t, **conditions(pipeline)).sample
    if network == "lora":
        plain.load_lora_weights(folder, weight_name=LORA_FILE)
    else:
        plain.unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    with torch.no_grad():
        after = plain.unet(x, t, **conditions(pipeline)).sample
        assert torch.equal(denoiser(x, t, pipeline.conditioning(["the cat"])), after)
    assert not torch.allclose(before, after, atol=1e-4), "it has learned something"
    plain.set_progress_bar_config(disable=True)
    plain.scheduler = diffusers.LCMScheduler.from_config(plain.scheduler.config)
    drawn = plain("the cat", num_inference_steps=2, guidance_scale=1.0, generator=image_generator(1, 0), output_type="np").images
    assert np.isfinite(drawn).all() and drawn.std() > 0


def conditions(pipeline: TeacherPipeline) -> dict[str, Any]:
    """What a UNet of SDXL's type is told of a caption."""
    text = pipeline.conditioning(["the cat"])
    return {"encoder_hidden_states": text.prompt_embeds, "added_cond_kwargs": {"text_embeds": text.pooled, "time_ids": text.time_ids}}
