"""`sample` against a plain call of diffusers' pipelines: not close, equal."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from schemas.errors import BadInput
from schemas.lightning import trailing_timesteps
from stages.diffusion.denoiser import UNetDenoiser
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.prediction import prediction_type
from stages.diffusion.sampling import check_sampler, draw_noise, image_generator, make_scheduler, sample, starting_noise
from tests import tiny_pipelines

PROMPTS = ["the red cat", "a dog"]


@pytest.fixture(scope="module", params=tiny_pipelines.KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.save(request.param, tmp_path_factory.mktemp("pipelines") / request.param)


def plain_call(folder: Path, scheduler: Any, **arguments: Any) -> torch.Tensor:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = scheduler
    images: torch.Tensor = pipeline(PROMPTS, generator=[image_generator(3, i) for i in range(2)], **arguments).images
    return images


@pytest.mark.parametrize(
    ("sampler", "steps", "guidance_scale", "prediction"),
    [
        ("trailing", 4, 1.0, None),
        ("trailing", 4, 5.0, None),
        ("trailing", 2, 0.0, None),
        ("trailing", 1, 1.0, "sample"),
        ("lcm", 4, 1.0, None),
        ("lcm", 3, 2.0, None),
        ("lcm", 1, 1.0, None),
    ],
)
def test_a_plain_diffusers_call_gives_equal_bits(
    folder: Path, sampler: str, steps: int, guidance_scale: float, prediction: str | None
) -> None:
    teacher = TeacherPipeline.load(folder)
    name = prediction or teacher.prediction.name
    generators = [image_generator(3, i) for i in range(2)]
    latents = sample(
        UNetDenoiser(teacher.unet, teacher.schedule, prediction_type(name)),
        draw_noise(generators, teacher.latent_shape),
        teacher.conditioning(PROMPTS),
        scheduler=make_scheduler(sampler, teacher.scheduler_config, name),
        steps=steps,
        guidance_scale=guidance_scale,
        unconditional=teacher.unconditional().with_time_ids(teacher.time_ids()),
        generator=generators,
    )
    scheduler = make_scheduler(sampler, teacher.scheduler_config, name)
    arguments = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    assert latents.isfinite().all()
    assert torch.equal(latents, plain_call(folder, scheduler, **arguments, output_type="latent"))
    assert torch.equal(teacher.decode(latents), plain_call(folder, scheduler, **arguments, output_type="pt"))


@pytest.mark.parametrize("sampler", ["trailing", "lcm"])
def test_bits_are_equal_in_bfloat16_too(folder: Path, sampler: str) -> None:
    teacher = TeacherPipeline.load(folder, dtype=torch.bfloat16)
    generators = [image_generator(3, i) for i in range(2)]
    latents = sample(
        teacher.denoiser(),
        draw_noise(generators, teacher.latent_shape, dtype=torch.bfloat16),
        teacher.conditioning(PROMPTS),
        scheduler=make_scheduler(sampler, teacher.scheduler_config, teacher.prediction.name),
        steps=4,
        guidance_scale=3.0,
        unconditional=teacher.unconditional().with_time_ids(teacher.time_ids()),
        generator=generators,
    )
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    pipeline.scheduler = make_scheduler(sampler, teacher.scheduler_config, teacher.prediction.name)
    random = [image_generator(3, i) for i in range(2)]
    assert torch.equal(latents, pipeline(PROMPTS, generator=random, num_inference_steps=4, guidance_scale=3.0, output_type="latent").images)


def test_the_published_scheduler_is_the_sampled_one_after_saving(folder: Path, tmp_path: Path) -> None:
    teacher = TeacherPipeline.load(folder)
    for sampler, kind in (("trailing", diffusers.EulerDiscreteScheduler), ("lcm", diffusers.LCMScheduler)):
        scheduler = make_scheduler(sampler, teacher.scheduler_config, "sample")
        scheduler.save_pretrained(tmp_path / sampler)
        again = kind.from_pretrained(tmp_path / sampler)
        assert {key: value for key, value in again.config.items() if key[0] != "_"} == {
            key: value for key, value in scheduler.config.items() if key[0] != "_"
        }
        assert torch.equal(again.alphas_cumprod.double(), teacher.schedule.alphas_cumprod)
        assert again.config.prediction_type == "sample"


def test_a_teachers_own_sampler_settings_are_left_behind() -> None:
    teachers = {"use_karras_sigmas": True, "clip_sample": True, "steps_offset": 1, "timestep_spacing": "leading", "beta_schedule": "linear"}
    config = teachers | {"beta_start": 0.0001, "beta_end": 0.02, "num_train_timesteps": 1000}
    euler, lcm = (make_scheduler(sampler, config, "epsilon") for sampler in ("trailing", "lcm"))
    assert (euler.config.use_karras_sigmas, euler.config.timestep_spacing, euler.config.beta_schedule) == (False, "trailing", "linear")
    assert (lcm.config.clip_sample, lcm.config.original_inference_steps) == (False, 50)
    with pytest.raises(BadInput, match="sampler 'unipc': expected one of trailing, lcm, ddim, pndm, heun, dpmpp"):
        make_scheduler("unipc", config, "epsilon")


def test_a_sampler_that_cannot_take_the_teacher_is_refused() -> None:
    for sampler in ("ddim", "pndm", "heun", "dpmpp"):
        for prediction in ("epsilon", "v_prediction"):
            check_sampler(sampler, {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": False}, prediction, 50)
        with pytest.raises(BadInput, match="30 steps leave its grid; expected a divisor of 1000"):
            check_sampler(sampler, {}, "epsilon", 30)
    for sampler in ("pndm", "heun"):
        with pytest.raises(BadInput, match=r"knows no rescale_betas_zero_snr, .*; expected one of trailing, lcm, ddim, dpmpp"):
            check_sampler(sampler, {"rescale_betas_zero_snr": True}, "v_prediction", 50)
    with pytest.raises(BadInput, match="sampler 'pndm': cannot take a teacher of prediction_type sample"):
        check_sampler("pndm", {}, "sample", 50)


@pytest.mark.parametrize(("sampler", "calls"), [("ddim", 10), ("pndm", 11), ("heun", 19), ("dpmpp", 10)])
def test_a_teachers_sampler_walks_the_trailing_grid_from_pure_noise(sampler: str, calls: int) -> None:
    scheduler = make_scheduler(sampler, {}, "epsilon")
    scheduler.set_timesteps(10)
    found = [int(timestep) for timestep in scheduler.timesteps]
    assert list(dict.fromkeys(found)) == list(trailing_timesteps(10)) and len(found) == calls


def test_noise_of_an_image_depends_on_seed_and_index_alone() -> None:
    shape = (4, 8, 8)
    batch = draw_noise([image_generator(3, i) for i in (0, 7)], shape)
    assert torch.equal(batch[1:], starting_noise(3, 7, shape))
    seen = [starting_noise(seed, index, shape) for seed in (0, 1) for index in (0, 1, 10, 11)]
    assert len({tuple(noise.flatten().tolist()) for noise in seen}) == 8
    assert abs(torch.cat(seen).mean().item()) < 0.1
    assert torch.cat(seen).std().item() == pytest.approx(1, abs=0.05)
    state = torch.random.get_rng_state()
    starting_noise(0, 0, shape)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_callback_sees_every_step(folder: Path) -> None:
    teacher = TeacherPipeline.load(folder)
    seen: list[tuple[int, torch.Tensor]] = []
    latents = sample(
        teacher.denoiser(),
        starting_noise(0, 0, teacher.latent_shape),
        teacher.conditioning(PROMPTS[:1]),
        scheduler=make_scheduler("trailing", teacher.scheduler_config, teacher.prediction.name),
        steps=3,
        callback=lambda step, x: seen.append((step, x)),
    )
    assert [step for step, _ in seen] == [0, 1, 2]
    assert seen[-1][1] is latents
