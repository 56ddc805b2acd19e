"""ControlNets: samples against diffusers' own pipelines, a new one that changes nothing, edges in closed form."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from stages.diffusion.control import ControlledDenoiser, edges
from stages.diffusion.pipeline import TeacherPipeline, load_controlnet
from stages.diffusion.sampling import draw_noise, image_generator, make_scheduler, sample
from tests import tiny_pipelines
from tests.distilled import controlnet_file

PROMPTS = ["the red cat", "a dog"]
PIPELINES = {"sdxl": "StableDiffusionXLControlNetPipeline", "sd15": "StableDiffusionControlNetPipeline"}


@pytest.fixture(scope="module", params=PIPELINES)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.save(kind, tmp_path_factory.mktemp("pipelines") / kind)


def drawn(teacher: TeacherPipeline, denoiser: Any, sampler: str) -> torch.Tensor:
    generators = [image_generator(3, i) for i in range(2)]
    return sample(
        denoiser,
        draw_noise(generators, teacher.latent_shape),
        teacher.conditioning(PROMPTS),
        scheduler=make_scheduler(sampler, teacher.scheduler_config, teacher.prediction.name),
        steps=4,
        guidance_scale=3.0,
        unconditional=teacher.unconditional().with_time_ids(teacher.time_ids()),
        generator=generators,
    )


@pytest.mark.parametrize("sampler", ["trailing", "lcm"])
def test_samples_are_those_of_diffusers_pipelines(folder: Path, kind: str, tmp_path: Path, sampler: str) -> None:
    teacher = TeacherPipeline.load(folder)
    place = controlnet_file(teacher.unet, tmp_path / "edges")
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(8))
    ours = drawn(teacher, ControlledDenoiser(teacher.denoiser(), load_controlnet(place), pictures, 0.7), sampler)
    assert not torch.equal(ours, drawn(teacher, teacher.denoiser(), sampler))

    parts = diffusers.DiffusionPipeline.from_pretrained(folder).components
    plain = getattr(diffusers, PIPELINES[kind])(**parts, controlnet=diffusers.ControlNetModel.from_pretrained(place))
    plain.set_progress_bar_config(disable=True)
    plain.scheduler = make_scheduler(sampler, teacher.scheduler_config, teacher.prediction.name)
    arguments = {"num_inference_steps": 4, "guidance_scale": 3.0, "controlnet_conditioning_scale": 0.7, "output_type": "latent"}
    theirs = plain(PROMPTS, image=pictures, generator=[image_generator(3, i) for i in range(2)], **arguments).images
    assert torch.equal(ours, theirs)


def test_a_new_one_changes_nothing(folder: Path, tmp_path: Path) -> None:
    """Its last convolutions are zeros."""
    teacher = TeacherPipeline.load(folder)
    controlnet = load_controlnet(controlnet_file(teacher.unet, tmp_path / "new", change=0))
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(8))
    controlled = drawn(teacher, ControlledDenoiser(teacher.denoiser(), controlnet, pictures, 1.0), "trailing")
    assert torch.equal(controlled, drawn(teacher, teacher.denoiser(), "trailing"))


def test_edges_are_where_the_luma_steps() -> None:
    picture = torch.zeros(3, 3, 6, 8)
    picture[0, :, :, 4:] = 0.5  # a vertical edge: two columns see it
    picture[1, 1, 3:, :] = 1  # a horizontal one of green
    found = edges(picture)
    assert found.shape == (3, 3, 6, 8)
    vertical, horizontal = torch.zeros(6, 8), torch.zeros(6, 8)
    vertical[:, 3:5] = horizontal[2:4] = 1
    torch.testing.assert_close(found[0], vertical.expand(3, 6, 8))
    torch.testing.assert_close(found[1], horizontal.expand(3, 6, 8))
    assert torch.equal(found[2], torch.zeros(3, 6, 8)), "nothing to see in an even picture"
    ramp = torch.linspace(0, 1, 8).expand(1, 3, 6, 8)
    torch.testing.assert_close(edges(ramp)[..., 1:-1], torch.ones(1, 3, 6, 6))
