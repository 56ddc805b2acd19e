"""The noise schedule and the grids against the papers' numbers and diffusers' own schedulers."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import BadInput
from stages.diffusion.schedule import CLEAN, NoiseSchedule, ddim_solver_timesteps, lcm_timesteps, trailing_timesteps

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SCHEDULE = NoiseSchedule.from_scheduler_config(BETAS)


@pytest.mark.parametrize(
    "row",
    [
        (0, 0.99915, 0.99957, 0.02915, 0.0292, 1.000),
        (10, 0.990431, 0.99520, 0.09782, 0.0983, 1.005),
        (249, 0.675432, 0.82185, 0.56971, 0.6932, 1.217),
        (499, 0.277670, 0.52694, 0.84990, 1.6129, 1.898),
        (749, 0.056623, 0.23796, 0.97128, 4.0817, 4.202),
        (999, 0.004660, 0.06826, 0.99767, 14.6146, 14.649),
    ],
)
def test_the_schedule_of_sd15_and_sdxl_has_its_known_values(row: tuple[int, float, float, float, float, float]) -> None:
    t, abar, alpha, sigma, k, inverse = row
    found_alpha, found_sigma = (value.item() for value in SCHEDULE.alpha_sigma(torch.tensor([t]), dtype=torch.float64))
    assert SCHEDULE.alphas_cumprod[t].item() == pytest.approx(abar, abs=6e-6 if t == 0 else 6e-7)
    assert found_alpha == pytest.approx(alpha, abs=6e-6)
    assert found_sigma == pytest.approx(sigma, abs=6e-6)
    assert found_sigma / found_alpha == pytest.approx(k, abs=6e-5)
    assert 1 / found_alpha == pytest.approx(inverse, abs=6e-4)


@pytest.mark.parametrize(
    ("steps", "grid"),
    [(1, (999,)), (2, (999, 499)), (4, (999, 749, 499, 249)), (8, (999, 874, 749, 624, 499, 374, 249, 124))],
)
def test_trailing_grids(steps: int, grid: tuple[int, ...]) -> None:
    assert trailing_timesteps(steps) == grid


def test_long_trailing_grids_begin_and_end_as_published() -> None:
    assert trailing_timesteps(32)[:5] == (999, 968, 937, 905, 874)
    assert trailing_timesteps(32)[-1] == 30
    assert trailing_timesteps(128)[:5] == (999, 991, 983, 976, 968)
    assert trailing_timesteps(128)[-1] == 7


def test_the_grids_of_the_chain_nest_exactly() -> None:
    chain = (128, 32, 8, 4, 2, 1)
    for many, few in pairwise(chain):
        every = trailing_timesteps(many)[:: many // few]
        assert every == trailing_timesteps(few)


@pytest.mark.parametrize(
    ("steps", "grid"),
    [(1, (999,)), (2, (999, 499)), (4, (999, 759, 499, 259)), (8, (999, 879, 759, 639, 499, 379, 259, 139))],
)
def test_lcm_grids(steps: int, grid: tuple[int, ...]) -> None:
    assert lcm_timesteps(steps) == grid


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 7, 8, 16, 25, 32, 50])
def test_grids_are_those_of_diffusers(steps: int) -> None:
    lcm = LCMScheduler(**BETAS)
    lcm.set_timesteps(steps)
    assert lcm_timesteps(steps) == tuple(lcm.timesteps.tolist())
    for scheduler in (EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing"), DDIMScheduler(**BETAS, timestep_spacing="trailing")):
        scheduler.set_timesteps(steps)
        assert trailing_timesteps(steps) == tuple(int(t) for t in scheduler.timesteps)


def test_the_solver_grid_is_the_lcm_grid_read_backwards() -> None:
    assert ddim_solver_timesteps() == tuple(range(19, 1000, 20))
    assert lcm_timesteps(50) == ddim_solver_timesteps()[::-1]
    with pytest.raises(ValueError, match="51 steps"):
        lcm_timesteps(51)


@pytest.mark.parametrize("config", [BETAS, {**BETAS, "beta_schedule": "linear"}, {"trained_betas": [0.1, 0.2, 0.3]}])
def test_schedules_equal_diffusers(config: dict[str, object]) -> None:
    assert torch.equal(NoiseSchedule.from_scheduler_config(config).alphas_cumprod, DDIMScheduler(**config).alphas_cumprod.double())


def test_zero_terminal_snr_ends_without_signal() -> None:
    config = BETAS | {"rescale_betas_zero_snr": True}
    ours, theirs = NoiseSchedule.from_scheduler_config(config).alphas_cumprod, DDIMScheduler(**config).alphas_cumprod.double()
    assert torch.allclose(ours, theirs, atol=1e-7, rtol=0)
    assert ours[-1] == 0


def test_timesteps_outside_the_schedule_are_refused_and_clean_is_free_of_noise() -> None:
    alpha, sigma = SCHEDULE.alpha_sigma(torch.tensor([CLEAN, 999]))
    assert alpha.shape == sigma.shape == (2, 1, 1, 1)
    assert (alpha[0].item(), sigma[0].item()) == (1, 0)
    for wrong in (-2, 1000):
        with pytest.raises(IndexError, match=str(wrong)):
            SCHEDULE.alpha_sigma(torch.tensor([wrong]))


@given(st.integers(0, 999), st.integers(0, 2**32))
def test_noise_is_added_as_diffusers_adds_it(t: int, seed: int) -> None:
    x0, eps = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
    timesteps = torch.tensor([t, 999 - t])
    assert torch.allclose(SCHEDULE.add_noise(x0, eps, timesteps), DDIMScheduler(**BETAS).add_noise(x0, eps, timesteps), atol=1e-6)


@pytest.mark.parametrize("config", [{"num_train_timesteps": 1000}, BETAS | {"beta_schedule": "sigmoid"}])
def test_schedules_that_are_not_known_are_refused(config: dict[str, object]) -> None:
    with pytest.raises(BadInput, match="beta"):
        NoiseSchedule.from_scheduler_config(config)
