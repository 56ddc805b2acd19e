"""Consistency distillation where the answer is known: the score of a Gaussian, whose ODE has a closed form, and of a mixture."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages.diffusion.conditioning import Conditioning
from stages.diffusion.denoiser import predict
from stages.diffusion.exact import GaussianMixtureDenoiser
from stages.diffusion.prediction import PREDICTION_TYPES
from stages.diffusion.schedule import append_dims, ddim_solver_timesteps
from stages.diffusion.solvers import boundary_scalings, ddim_move
from stages.lcm.distillation import ConsistencyDistillation
from stages.students import Student
from stages.training import Draw
from stages.training.latent_batches import LatentBatch
from tests.stages.consistent import NULL, config, convergence
from tests.stages.mixtures import CPU, MEANS, SCHEDULE, SHAPE
from tests.training.toys import make_workspace

GRID = torch.tensor(ddim_solver_timesteps(50))
STD = 0.3


def gaussian() -> GaussianMixtureDenoiser:
    return GaussianMixtureDenoiser(MEANS[:1], STD, schedule=SCHEDULE)


def along_the_ode(x_t: Tensor, t: Tensor) -> Tensor:
    """x_0 of the exact flow of N(m, s^2): m and x - m grow with alpha and with the marginal deviation sqrt(alpha^2 s^2 + sigma^2)."""
    (alpha, sigma), (alpha_0, sigma_0) = (SCHEDULE.alpha_sigma(each, x_t.ndim) for each in (t, torch.zeros_like(t)))
    ratio = ((alpha_0**2 * STD**2 + sigma_0**2) / (alpha**2 * STD**2 + sigma**2)).sqrt()
    return alpha_0 * MEANS[:1] + ratio * (x_t - alpha * MEANS[:1])


class Endpoint:
    """The network whose consistency function is `end`: x0 = (end(x, t) - c_skip x) / c_out."""

    schedule, prediction = SCHEDULE, PREDICTION_TYPES["sample"]

    def __init__(self, exact: bool) -> None:
        self.exact = exact

    def __call__(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        c_skip, c_out = boundary_scalings(timesteps, x_t.ndim)
        end = along_the_ode(x_t, timesteps) if self.exact else solved(x_t, timesteps, conditioning)
        return torch.where(c_out == 0, x_t, (end - c_skip * x_t) / c_out.clamp(min=1e-6))


def solved(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """Where the solver's moves lead: from grid point to grid point, the last one to timestep 0."""
    teacher = gaussian()
    for later in reversed(GRID.tolist()):
        at = torch.full_like(t, later)
        moved = ddim_move(teacher, x_t, at, (at - 20).clamp(min=0), conditioning)
        x_t = torch.where(append_dims(t >= later, x_t.ndim), moved, x_t)
    return x_t


def loss_of(denoiser: Endpoint | GaussianMixtureDenoiser) -> float:
    """The loss of a network that is its own target, without guidance."""
    settings = config(guidance_w=0.0, loss="l2")
    method = ConsistencyDistillation(settings, teacher=gaussian(), student=student_of(denoiser), unconditional=NULL)
    draw = Draw(5, (0,), range(256), CPU)
    latents = MEANS[:1] + STD * draw.normal("latents", SHAPE)
    with torch.no_grad():
        prepared = method.prepare(LatentBatch(latents, Conditioning(torch.zeros(256, 1, 1))), draw)
        loss = method.loss("student", prepared, draw)["loss"]
    assert isinstance(loss, Tensor)
    return float(loss)


def student_of(denoiser: Endpoint | GaussianMixtureDenoiser) -> Student:
    return Student(denoiser, {"none": torch.nn.Parameter(torch.zeros(1))}, {"none": torch.zeros(1)})


def test_the_odes_endpoint_is_the_fixed_point_of_the_loss() -> None:
    """Zero where the solver's own moves lead. The exact flow has what moves of 20 timesteps err by, here a tenth of what the teacher's x0 has."""
    of_solver, of_flow, of_teacher = loss_of(Endpoint(exact=False)), loss_of(Endpoint(exact=True)), loss_of(gaussian())
    assert of_solver < 1e-10
    assert of_solver < of_flow < 0.2 * of_teacher


def test_the_solvers_endpoint_is_the_odes() -> None:
    noise, t = torch.randn(256, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.full((256,), 999)
    exact, moved = along_the_ode(noise, t), solved(noise, t, Conditioning(torch.zeros(256, 1, 1)))
    assert (moved - exact).square().mean().sqrt() < 0.1 * exact.std(0).mean(), "50 moves are 8.5 % short"
    first = predict(gaussian(), noise, t, Conditioning(torch.zeros(256, 1, 1))).x0
    assert (first - exact).square().mean().sqrt() > 0.5 * exact.std(0).mean(), "one step of the teacher is far from it"


@pytest.mark.slow
def test_longer_skips_converge_in_fewer_steps(tmp_path: Path) -> None:
    """LCM 4.3: with k = 1 what is known at t = 0 spreads one timestep an update, with k = 20 twenty. The curves of `benchmarks.skips`."""
    long, short = (convergence(timesteps, make_workspace(tmp_path / str(timesteps))) for timesteps in (50, 1000))
    steps = list(long)
    assert steps == list(short) == list(range(25, 201, 25))
    assert all(long[step] < short[step] for step in steps), (long, short)
    assert all(curve[200] < curve[50] for curve in (long, short)), "error falls with training"
    assert long[200] < 0.5 * short[200]
    reached = next(step for step in steps if long[step] <= min(short.values()))
    assert reached <= 50, "as far as ever with k = 1, in at most a quarter of the steps"
