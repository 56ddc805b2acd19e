"""Our solvers against diffusers' own schedulers, and against the exact flow of Gaussian data."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler
from torch import Tensor

from stages.diffusion.conditioning import Conditioning
from stages.diffusion.denoiser import guided_output, predict
from stages.diffusion.exact import GaussianMixtureDenoiser
from stages.diffusion.prediction import PREDICTION_TYPES
from stages.diffusion.sampling import make_scheduler, sample
from stages.diffusion.schedule import CLEAN, lcm_timesteps, trailing_timesteps
from stages.diffusion.solvers import boundary_scalings, consistency, ddim_move, ddim_moves, euler_step, lcm_step
from tests.diffusion.test_prediction import NAMES, normal
from tests.diffusion.test_schedule import BETAS, SCHEDULE

MEANS = normal(1, 3, 4, 2, 2, dtype=torch.float32)
ANYTHING = Conditioning(torch.zeros(5, 1, 1))


def mixture(prediction: str = "epsilon", **more: Any) -> GaussianMixtureDenoiser:
    return GaussianMixtureDenoiser(
        MEANS, 0.3, torch.tensor([0.5, 0.3, 0.2]), schedule=SCHEDULE, prediction=PREDICTION_TYPES[prediction], **more
    )


def at(t: int, batch: int = 5) -> Tensor:
    return torch.full((batch,), t)


def ours(denoiser: GaussianMixtureDenoiser, x: Tensor, steps: int) -> list[Tensor]:
    trajectory = []
    for t, s in pairwise((*trailing_timesteps(steps), CLEAN)):
        x = ddim_move(denoiser, x, at(t), at(s), ANYTHING)
        trajectory.append(x)
    return trajectory


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 40, 125])  # divisors of T: at others DDIMScheduler moves by T // steps, off its own grid
def test_ddim_moves_are_those_of_ddim_scheduler(prediction: str, steps: int) -> None:
    denoiser = mixture(prediction)
    noise = normal(2, 5, 4, 2, 2, dtype=torch.float32)
    scheduler = DDIMScheduler(**BETAS, prediction_type=prediction, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    x = noise
    for t, expected in zip(scheduler.timesteps, ours(denoiser, noise, steps), strict=True):
        x = scheduler.step(denoiser(x, at(int(t)), ANYTHING), t, x).prev_sample
        assert torch.allclose(x, expected, atol=1e-5)


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 32, 128])
def test_ddim_moves_are_those_of_euler_trailing(prediction: str, steps: int) -> None:
    """Euler's frame is x_t / sqrt(abar_t), so its path is compared after scaling back."""
    denoiser = mixture(prediction)
    noise = normal(2, 5, 4, 2, 2, dtype=torch.float32)
    scheduler = EulerDiscreteScheduler(**BETAS, prediction_type=prediction, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    alpha, _ = SCHEDULE.alpha_sigma(at(999))
    x = noise / alpha  # the same x_t = noise; the sampler itself starts from noise * sigma_max
    grid = (*trailing_timesteps(steps), CLEAN)
    for t, s, expected in zip(scheduler.timesteps, grid[1:], ours(denoiser, noise, steps), strict=True):
        x = scheduler.step(denoiser(scheduler.scale_model_input(x, t), at(int(t)), ANYTHING), t, x).prev_sample
        assert torch.allclose(SCHEDULE.alpha_sigma(at(s))[0] * x, expected, atol=1e-5)


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_consistency_steps_are_those_of_lcm_scheduler(prediction: str, steps: int) -> None:
    denoiser = mixture(prediction)
    scheduler = LCMScheduler(**BETAS, prediction_type=prediction)
    scheduler.set_timesteps(steps)
    x = y = normal(2, 5, 4, 2, 2, dtype=torch.float32)
    ours_random, theirs_random = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    grid = lcm_timesteps(steps)
    for t, s in zip(scheduler.timesteps, (*grid[1:], CLEAN), strict=True):
        x = scheduler.step(denoiser(x, at(int(t)), ANYTHING), t, x, generator=theirs_random).prev_sample
        y = consistency(predict(denoiser, y, at(int(t)), ANYTHING).x0, y, boundary_scalings(at(int(t))))
        if s != CLEAN:
            y = lcm_step(y, torch.randn(y.shape, generator=ours_random), *SCHEDULE.alpha_sigma(at(s)))
        assert torch.allclose(x, y, atol=1e-5)


def test_boundary_scalings_are_the_published_ones() -> None:
    c_skip, c_out = (value.flatten().tolist() for value in boundary_scalings(torch.tensor([0, 1, 19])))
    assert c_skip == pytest.approx([1, 0.00249, 6.9e-6], rel=5e-3)
    assert c_out[0] == 0
    assert c_out[2] == pytest.approx(1, abs=1e-5)


def exact_flow(x: Tensor, t: int, s: int, mean: Tensor, std: float) -> Tensor:
    """Solution of the probability-flow ODE from t to s for data N(mean, std^2 I): deviations from the mean scale with the marginal's spread."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = SCHEDULE.alpha_sigma(at(t, 1)), SCHEDULE.alpha_sigma(at(s, 1))
    spread_t, spread_s = (alpha_t**2 * std**2 + sigma_t**2).sqrt(), (alpha_s**2 * std**2 + sigma_s**2).sqrt()
    return alpha_s * mean + spread_s / spread_t * (x - alpha_t * mean)


@pytest.mark.parametrize("prediction", NAMES)
def test_many_moves_follow_the_exact_flow_of_gaussian_data(prediction: str) -> None:
    denoiser = GaussianMixtureDenoiser(MEANS[:1], 0.7, schedule=SCHEDULE, prediction=PREDICTION_TYPES[prediction])
    noise = normal(3, 5, 4, 2, 2, dtype=torch.float32)
    timesteps = [at(t) for t in (*range(999, -1, -1), CLEAN)]
    errors = [
        (
            ddim_moves(denoiser, noise, [at(t) for t in (*trailing_timesteps(steps), CLEAN)], ANYTHING)
            - exact_flow(noise, 999, CLEAN, MEANS[0], 0.7)
        )
        .abs()
        .max()
        .item()
        for steps in (8, 32, 125)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]  # first order
    finest = ddim_moves(denoiser, noise, timesteps, ANYTHING)
    assert torch.allclose(finest, exact_flow(noise, 999, CLEAN, MEANS[0], 0.7), atol=2e-2)


def test_the_exact_score_is_the_gradient_of_the_log_density() -> None:
    denoiser = mixture()
    x = normal(4, 5, 4, 2, 2).requires_grad_()
    alpha, sigma = SCHEDULE.alpha_sigma(at(300), dtype=torch.float64)
    variance = alpha**2 * 0.3**2 + sigma**2
    away = ((x[:, None] - alpha[:, None] * MEANS.double()[None]) ** 2).flatten(2).sum(-1)
    log_density = torch.logsumexp(denoiser.weights.double().log() - away / (2 * variance.flatten(1)), dim=1)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    assert torch.allclose(denoiser(x, at(300), ANYTHING), -sigma * score, atol=1e-6)


def test_a_mixture_can_be_conditioned_on_its_components() -> None:
    denoiser = mixture(by_class=True)
    x = normal(5, 5, 4, 2, 2, dtype=torch.float32)
    classes = Conditioning(torch.tensor([0.0, 1, 2, -1, 1]).reshape(5, 1, 1))
    outputs = denoiser(x, at(500), classes)
    for i, component in enumerate([0, 1, 2, None, 1]):
        alone = mixture() if component is None else GaussianMixtureDenoiser(MEANS[component : component + 1], 0.3, schedule=SCHEDULE)
        assert torch.allclose(outputs[i : i + 1], alone(x[i : i + 1], at(500, 1)), atol=1e-6)


def test_guided_predictions_call_the_denoiser_once_with_both_halves() -> None:
    denoiser = mixture(by_class=True)
    calls: list[int] = []

    class Counting:
        schedule, prediction = denoiser.schedule, denoiser.prediction

        def __call__(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
            calls.append(len(x_t))
            return denoiser(x_t, timesteps, conditioning)

    x = normal(6, 5, 4, 2, 2, dtype=torch.float32)
    conditioning, unconditional = Conditioning(torch.ones(5, 1, 1)), Conditioning(-torch.ones(1, 1, 1))
    guided = guided_output(Counting(), x, at(700), conditioning, unconditional=unconditional, guidance_scale=6.0)
    without, with_text = denoiser(x, at(700), unconditional.expand(5)), denoiser(x, at(700), conditioning)
    assert calls == [10]
    assert torch.allclose(guided, without + 6 * (with_text - without), atol=1e-6)
    with pytest.raises(ValueError, match="unconditional"):
        guided_output(denoiser, x, at(700), conditioning, guidance_scale=6.0)


@pytest.mark.parametrize("prediction", NAMES)
def test_euler_steps_are_ddim_moves_in_the_other_frame(prediction: str) -> None:
    denoiser = mixture(prediction)
    x_t = normal(7, 5, 4, 2, 2, dtype=torch.float32)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = SCHEDULE.alpha_sigma(at(749)), SCHEDULE.alpha_sigma(at(499))
    x0 = predict(denoiser, x_t, at(749), ANYTHING).x0
    moved = alpha_s * euler_step(x_t / alpha_t, x0, sigma_t / alpha_t, sigma_s / alpha_s)
    assert torch.allclose(moved, ddim_move(denoiser, x_t, at(749), at(499), ANYTHING), atol=1e-5)


@pytest.mark.parametrize("sampler", ["trailing", "lcm"])
def test_samples_of_a_mixture_lie_on_its_components(sampler: str) -> None:
    """Both samplers recover the data: an LCM step needs a consistency function, which for nearly discrete data the posterior mean is."""
    denoiser = GaussianMixtureDenoiser(MEANS, 0.02, schedule=SCHEDULE)
    draw: Callable[[int], Tensor] = lambda seed: normal(seed, 64, 4, 2, 2, dtype=torch.float32)  # noqa: E731
    conditioning = Conditioning(torch.zeros(64, 1, 1))
    scheduler = make_scheduler(sampler, BETAS, "epsilon")
    found = sample(denoiser, draw(8), conditioning, scheduler=scheduler, steps=32, generator=torch.Generator().manual_seed(1))
    distances = (found[:, None] - MEANS[None]).flatten(2).norm(dim=-1)
    assert distances.min(dim=1).values.max() < 0.5
    assert set(distances.argmin(dim=1).tolist()) == {0, 1, 2}
