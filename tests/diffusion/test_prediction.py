"""Prediction types convert into each other without loss, and guidance means the same in both conventions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import BadInput
from stages.diffusion.guidance import guide_imagen, guide_lcm
from stages.diffusion.prediction import PREDICTION_TYPES, prediction_type
from tests.diffusion.test_schedule import SCHEDULE

NAMES = sorted(PREDICTION_TYPES)
seeds = st.integers(0, 2**32)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(st.sampled_from(NAMES), st.lists(st.integers(0, 999), min_size=1, max_size=3), seeds)
def test_what_an_output_means_survives_the_round_trip(name: str, timesteps: list[int], seed: int) -> None:
    kind = prediction_type(name)
    x0, eps = normal(seed, 2, len(timesteps), 4, 2, 2)
    alpha, sigma = SCHEDULE.alpha_sigma(torch.tensor(timesteps), dtype=torch.float64)
    x_t = alpha * x0 + sigma * eps
    output = kind.from_x0_eps(x0, eps, alpha, sigma)
    again_x0, again_eps = kind.to_x0_eps(output, x_t, alpha, sigma)
    assert torch.allclose(again_x0, x0, atol=1e-11)
    assert torch.allclose(again_eps, eps, atol=1e-11)


@given(st.sampled_from(NAMES), st.sampled_from(NAMES), st.integers(0, 999), seeds)
def test_any_output_can_be_said_in_any_type(one: str, other: str, t: int, seed: int) -> None:
    """x0 and eps read from an arbitrary output are consistent: they make x_t, and another type's output made of them reads the same."""
    output, x_t = normal(seed, 2, 1, 4, 2, 2)
    alpha, sigma = SCHEDULE.alpha_sigma(torch.tensor([t]), dtype=torch.float64)
    x0, eps = prediction_type(one).to_x0_eps(output, x_t, alpha, sigma)
    assert torch.allclose(alpha * x0 + sigma * eps, x_t, atol=1e-11)
    said = prediction_type(other).from_x0_eps(x0, eps, alpha, sigma)
    assert torch.allclose(prediction_type(other).to_x0(said, x_t, alpha, sigma), x0, atol=1e-10)
    assert torch.allclose(prediction_type(other).to_eps(said, x_t, alpha, sigma), eps, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_widened_before_it_is_divided(name: str) -> None:
    output, x_t = normal(0, 2, 1, 4, 2, 2).half()
    alpha, sigma = SCHEDULE.alpha_sigma(torch.tensor([999]))
    for value in prediction_type(name).to_x0_eps(output, x_t, alpha, sigma):
        assert value.dtype == torch.float32
    exact = prediction_type(name).to_x0(output.double(), x_t.double(), alpha.double(), sigma.double())
    assert torch.allclose(prediction_type(name).to_x0(output, x_t, alpha, sigma).double(), exact, atol=1e-5)


def test_an_unknown_type_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match=r"'flow'.*epsilon.*v_prediction.*sample"):
        prediction_type("flow")


@given(st.floats(0, 20), seeds)
def test_the_two_conventions_differ_by_one(w: float, seed: int) -> None:
    conditional, unconditional = normal(seed, 2, 3, 4, 2, 2)
    assert torch.allclose(guide_lcm(conditional, unconditional, w), guide_imagen(unconditional, conditional, w + 1), atol=1e-9)


def test_no_guidance_is_one_in_imagens_convention_and_zero_in_lcms() -> None:
    conditional, unconditional = normal(0, 2, 3, 4, 2, 2)
    assert torch.allclose(guide_imagen(unconditional, conditional, 1.0), conditional)
    assert torch.equal(guide_lcm(conditional, unconditional, 0.0), conditional)
    assert torch.equal(guide_imagen(unconditional, conditional, 0.0), unconditional)


@given(st.sampled_from(NAMES), st.integers(0, 999), st.floats(1, 10), seeds)
def test_guiding_the_output_guides_x0_and_eps(name: str, t: int, scale: float, seed: int) -> None:
    kind = prediction_type(name)
    conditional, unconditional, x_t = normal(seed, 3, 1, 4, 2, 2)
    alpha, sigma = SCHEDULE.alpha_sigma(torch.tensor([t]), dtype=torch.float64)
    of_output = kind.to_x0_eps(guide_imagen(unconditional, conditional, scale), x_t, alpha, sigma)
    each = zip(kind.to_x0_eps(unconditional, x_t, alpha, sigma), kind.to_x0_eps(conditional, x_t, alpha, sigma), strict=True)
    for guided, (without, with_text) in zip(of_output, each, strict=True):
        assert torch.allclose(guided, guide_imagen(without, with_text, scale), atol=1e-9)
