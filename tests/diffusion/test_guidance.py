"""Guidance as a network's input: the embedding is diffusers' own, and a UNet that gets it begins as it was."""

from pathlib import Path

import diffusers
import pytest
import torch

from stages.diffusion.conditioning import Conditioning
from stages.diffusion.denoiser import UNetDenoiser
from stages.diffusion.guidance import add_guidance_input, embed_guidance, guide_imagen, guide_lcm
from stages.diffusion.prediction import PREDICTION_TYPES
from stages.diffusion.schedule import NoiseSchedule
from stages.students import save_unet
from tests import tiny_pipelines

SCHEDULE = NoiseSchedule.from_scheduler_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
W = torch.tensor([0.0, 1.0, 7.5, 13.99])


@pytest.mark.parametrize("dim", [8, 256, 512])
def test_w_is_embedded_as_diffusers_pipelines_do(dim: int) -> None:
    pipelines = (diffusers.LatentConsistencyModelPipeline, diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline)
    for pipeline in pipelines:
        assert torch.equal(embed_guidance(W, dim), pipeline.get_guidance_scale_embedding(None, W, embedding_dim=dim))


def test_both_conventions_are_one_guidance() -> None:
    conditional, unconditional = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    w = W.reshape(4, 1, 1, 1)
    torch.testing.assert_close(guide_imagen(unconditional, conditional, 1 + w), guide_lcm(conditional, unconditional, w))


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_unet_that_takes_w_begins_as_it_was_and_is_a_diffusers_unet(kind: tiny_pipelines.Kind, tmp_path: Path) -> None:
    pipeline = tiny_pipelines.build(kind)
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(4, 4, 8, 8, generator=generator), torch.tensor([999, 499, 19, 0])
    text = torch.randn(4, 12, pipeline.unet.config.cross_attention_dim, generator=generator)
    conditioning = Conditioning(text, torch.randn(4, 20, generator=generator), torch.full((4, 6), 16.0))
    denoiser = UNetDenoiser(pipeline.unet, SCHEDULE, PREDICTION_TYPES["epsilon"])
    with torch.no_grad():
        before = denoiser(x, t, conditioning)
        assert torch.equal(denoiser(x, t, conditioning.with_guidance(W)), before), "a UNet without the input is not told"
        add_guidance_input(pipeline.unet)
        torch.testing.assert_close(denoiser(x, t, conditioning.with_guidance(W)), before)
        projection = pipeline.unet.time_embedding.cond_proj.weight
        projection.add_(torch.randn(projection.shape, generator=generator))
        told = denoiser(x, t, conditioning.with_guidance(W))
    assert projection.shape[1] == 256
    assert all((told[row] - before[row]).abs().max() > 1e-3 for row in range(4))
    with pytest.raises(ValueError, match="expected guidance_w"):
        denoiser(x, t, conditioning)

    save_unet(pipeline.unet, tmp_path)
    again, info = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(UNetDenoiser(again.eval(), SCHEDULE, denoiser.prediction)(x, t, conditioning.with_guidance(W)), told)


def test_w_goes_where_its_samples_go() -> None:
    conditioning = Conditioning(torch.zeros(4, 1, 1)).with_guidance(W)
    assert torch.equal(conditioning[[2, 0]].guidance_w, W[[2, 0]])  # type: ignore[arg-type]
    assert conditioning.to(dtype=torch.bfloat16).guidance_w is W
    assert conditioning.with_time_ids(None).guidance_w is W
    assert conditioning.with_guidance(2.5)[1].expand(3).guidance_w.tolist() == [2.5] * 3  # type: ignore[union-attr]
    assert torch.equal(Conditioning.cat([conditioning, conditioning]).guidance_w, torch.cat([W, W]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="guidance_w: given for 1 of 2"):
        Conditioning.cat([conditioning, conditioning.with_guidance(None)])
