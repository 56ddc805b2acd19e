"""Distribution matching where everything is known: the gradient of KL, the weight of eq. 8, the whole loss by hand."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from stages.diffusion.conditioning import Conditioning
from stages.diffusion.exact import GaussianMixtureDenoiser
from stages.dmd.batches import DmdBatch, PairBatch, batch_reader
from stages.dmd.losses import matching_gradient, matching_loss
from stages.dmd.matching import FAKE_SCORE, STUDENT, DistributionMatching
from stages.training import Draw
from tests.stages.consistent import NULL
from tests.stages.matched import AffineGenerator, MadeUpPairs, a_matching, config, in_training
from tests.stages.mixtures import CPU, MEANS, SCHEDULE, SHAPE, MixtureSet

REAL_MEANS, REAL_STD = torch.tensor([-1.2, 0.7]), 0.5
ROWS = 16


def normal(x: np.ndarray, mean: float, variance: float) -> np.ndarray:
    return np.exp(-((x - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


def divergence(a: float, b: float, abar: float) -> float:
    """KL of the generator's noised outputs to the mixture's, by the trapezoid rule."""
    alpha, sigma2 = math.sqrt(abar), 1 - abar
    x = np.linspace(-12, 12, 200_001)
    fake = normal(x, alpha * b, alpha**2 * a**2 + sigma2)
    real = sum(0.5 * normal(x, alpha * float(mean), alpha**2 * REAL_STD**2 + sigma2) for mean in REAL_MEANS)
    inside = fake > 1e-290
    return float(np.trapezoid(fake[inside] * np.log(fake[inside] / real[inside]), x[inside]))


@pytest.mark.parametrize("t", [20, 150, 500, 979])
@pytest.mark.parametrize(("a", "b"), [(0.8, 0.5), (0.3, -1.0)])
def test_with_an_exact_fake_score_the_gradient_is_that_of_the_divergence(a: float, b: float, t: int) -> None:
    """E[alpha_t (s_fake - s_real) dG/dtheta] over noise by Gauss and Hermite's rule; algorithm 2's gradient is w_t (s_fake - s_real)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    z, eps = (torch.from_numpy(grid.ravel()).reshape(-1, 1, 1, 1) for grid in np.meshgrid(nodes, nodes))
    weight = torch.from_numpy(np.outer(weights, weights).ravel() / (2 * math.pi))
    generator = AffineGenerator(a, b)
    teacher = GaussianMixtureDenoiser(REAL_MEANS.reshape(2, 1, 1, 1).double(), REAL_STD, schedule=SCHEDULE)
    fake = in_training(generator)
    fake = type(fake)(generator.exact_score(), {}, {})
    method = DistributionMatching(config(guidance_scale=1.0), teacher=teacher, student=in_training(generator), fake=fake)
    timesteps = torch.full((len(z),), t)
    nothing = Conditioning(torch.zeros(len(z), 1, 1))
    x = generator(z, timesteps, nothing)
    found = method.gradient(x.detach(), eps, timesteps, nothing)
    abar = float(SCHEDULE.alphas_cumprod[t])
    x_t = math.sqrt(abar) * x.detach() + math.sqrt(1 - abar) * eps
    x0_real = teacher.posterior_mean(x_t, timesteps)
    w = (1 - abar) / math.sqrt(abar) / (x.detach() - x0_real).abs()  # eq. 8; C S is 1
    direction = math.sqrt(abar) * found / w
    ours = torch.autograd.grad((weight.reshape(-1, 1, 1, 1) * direction * x).sum(), [generator.a, generator.b])
    h = 1e-4
    by_a = (divergence(a + h, b, abar) - divergence(a - h, b, abar)) / (2 * h)
    by_b = (divergence(a, b + h, abar) - divergence(a, b - h, abar)) / (2 * h)
    assert [float(value) for value in ours] == pytest.approx([by_a, by_b], abs=1e-4 * max(1, abs(by_a), abs(by_b)))


def test_the_weight_is_that_of_the_paper() -> None:
    """w_t (s_fake - s_real) with eq. 8's weight, sample by sample."""
    random = torch.Generator().manual_seed(1)
    x, x_t, x0_fake, x0_real = (torch.randn(5, *SHAPE, generator=random, dtype=torch.float64) for _ in range(4))
    timesteps = torch.tensor([20, 249, 500, 749, 980])
    gradient = matching_gradient(x, x0_fake, x0_real)
    for row, t in enumerate(timesteps.tolist()):
        alpha, sigma = float(SCHEDULE.alphas_cumprod[t].sqrt()), float((1 - SCHEDULE.alphas_cumprod[t]).sqrt())
        s_fake, s_real = (-(x_t[row] - alpha * x0[row]) / sigma**2 for x0 in (x0_fake, x0_real))
        w = sigma**2 / alpha * x[row].numel() / (x0_real[row] - x[row]).abs().sum()
        torch.testing.assert_close(gradient[row], w * (s_fake - s_real), rtol=1e-6, atol=1e-6)


def test_no_gradient_flows_through_weight_or_scores() -> None:
    x = torch.randn(3, *SHAPE, dtype=torch.float64, requires_grad=True)
    gradient = matching_gradient(x, 0.5 * x, x**2)
    matching_loss(x, gradient).backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, gradient / x.numel(), rtol=1e-12, atol=0)


def both(rows: int = ROWS) -> DmdBatch:
    return batch_reader(MixtureSet(), MadeUpPairs())(range(rows))


def x0_of(output: Tensor, x_t: Tensor, t: Tensor, kind: str) -> Tensor:
    abar = SCHEDULE.alphas_cumprod[t].reshape(-1, 1, 1, 1).float()
    a, b = abar.sqrt(), (1 - abar).sqrt()
    return {"epsilon": lambda: (x_t - b * output) / a, "v_prediction": lambda: a * x_t - b * output, "sample": lambda: output}[kind]()


def noised(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    abar = SCHEDULE.alphas_cumprod[t].reshape(-1, 1, 1, 1).float()
    return abar.sqrt() * x + (1 - abar).sqrt() * eps


def parts(draw: Draw, purpose: str, count: int, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    draws = [draw.fold(purpose, part) for part in range(count)]
    eps = torch.cat([one.normal("eps", SHAPE) for one in draws])
    return eps, lowest + torch.cat([one.integers("timestep", highest - lowest + 1) for one in draws])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_students_gradient_is_the_one_by_hand(kind: str) -> None:
    """All three losses on outputs of fresh noise and of the pairs': what each weighs in d loss / d x, put through the network."""
    settings = config(guidance_scale=3.0, gan={}, regression={"distance": "l2", "weight": 0.25})
    method = a_matching(settings, kind)
    assert method.judge is not None
    batch, draw = both(), Draw(5, (0, STUDENT, 1), range(ROWS), CPU)
    method.loss(STUDENT, batch, draw)["loss"].backward()  # type: ignore[union-attr]
    ours = [parameter.grad for parameter in method.players[STUDENT].parameters.values()]

    assert batch.pairs is not None
    z = torch.cat([draw.normal("noise", SHAPE), batch.pairs.noise])
    conditioning = Conditioning.cat([batch.conditioning, batch.conditioning])
    last = torch.full((2 * ROWS,), 999)
    x = x0_of(method.student(z, last, conditioning), z, last, kind)
    eps, t = parts(draw, "matched", 2, 20, 980)
    assert int(t.min()) >= 20 and int(t.max()) <= 980
    x_t = noised(x.detach(), eps, t)
    with torch.no_grad():
        cond, uncond = (method.teacher(x_t, t, c) for c in (conditioning, NULL.expand(2 * ROWS)))
        real = x0_of(uncond + 3.0 * (cond - uncond), x_t, t, kind)
        fake = x0_of(method.fake(x_t, t, conditioning), x_t, t, kind)
        by_x = (fake - real) / (x - real).abs().flatten(1).mean(1).reshape(-1, 1, 1, 1) / x.numel()
        by_x[ROWS:] += 0.25 * 2 * (x[ROWS:] - batch.pairs.outputs) / batch.pairs.outputs.numel()
    judged_eps, judged_t = parts(draw, "judged", 2, 0, 999)
    again = x.detach().requires_grad_(True)
    logits = method.judge(noised(again, judged_eps, judged_t), judged_t, conditioning)
    (by_judge,) = torch.autograd.grad(softplus(-logits).mean(), again)
    expected = torch.autograd.grad(x, list(method.players[STUDENT].parameters.values()), by_x + 5e-3 * by_judge)
    for found, hand in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, hand, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_fake_score_learns_to_denoise_what_the_student_makes(kind: str) -> None:
    method = a_matching(config(gan={}), kind)
    assert method.judge is not None
    batch, draw = both(), Draw(5, (0, FAKE_SCORE, 0), range(ROWS), CPU)
    found = method.loss(FAKE_SCORE, batch, draw)
    with torch.no_grad():
        x, conditioning = method.outputs(batch, draw)
    eps, t = parts(draw, "denoised", 2, 0, 999)
    abar = SCHEDULE.alphas_cumprod[t].reshape(-1, 1, 1, 1).float()
    target = {"epsilon": eps, "sample": x, "v_prediction": abar.sqrt() * eps - (1 - abar).sqrt() * x}[kind]
    denoising = (method.fake(noised(x, eps, t), t, conditioning) - target).square().mean()
    assert batch.real is not None
    real_eps, real_t = parts(draw, "judged-real", 1, 0, 999)
    fake_eps, fake_t = parts(draw, "judged-fake", 2, 0, 999)
    real = method.judge(noised(batch.real.latents, real_eps, real_t), real_t, batch.real.conditioning)
    fake = method.judge(noised(x, fake_eps, fake_t), fake_t, conditioning)
    torch.testing.assert_close(found["loss"], denoising + 1e-2 * (softplus(-real).mean() + softplus(fake).mean()), rtol=1e-5, atol=1e-6)
    found["loss"].backward()  # type: ignore[union-attr]
    assert all(parameter.grad is None for parameter in method.players[STUDENT].parameters.values())
    assert all(parameter.grad is not None for parameter in method.players[FAKE_SCORE].parameters.values())


def test_the_loss_is_the_same_however_the_batch_is_cut() -> None:
    method = a_matching(config(gan={}, steps=4, regression=None))
    reader = batch_reader(MixtureSet(), None)
    for player in (STUDENT, FAKE_SCORE):
        for key in range(4):  # other steps of the grid
            whole = method.loss(player, reader(range(8)), Draw(5, (key, player, 0), range(8), CPU))["loss"]
            halves = [method.loss(player, reader(part), Draw(5, (key, player, 0), part, CPU))["loss"] for part in (range(4), range(4, 8))]
            torch.testing.assert_close(sum(halves) / 2, whole, rtol=1e-5, atol=1e-6)  # type: ignore[operator,arg-type]


def test_several_steps_are_trained_on_their_own_outputs() -> None:
    """The input at the k-th timestep is the student's x0 of the one before, with fresh noise; every step of the grid has its turn."""
    method = a_matching(config(steps=4, regression=None))
    batch = batch_reader(MixtureSet(), None)(range(6))
    student, grid, seen = method.student, (999, 749, 499, 249), set()
    for key in range(16):
        draw = Draw(2, (key,), range(6), CPU)
        x, _ = method.outputs(batch, draw)
        k = draw.shared_integer("grid", 4)
        x_t = draw.normal("noise", SHAPE)
        for call in range(k + 1):
            t = torch.full((6,), grid[call])
            if call:
                x_t = noised(x0, draw.normal(f"fresh-{call}", SHAPE), t)  # noqa: F821
            x0 = x0_of(student(x_t, t, batch.conditioning), x_t, t, "epsilon")
        torch.testing.assert_close(x, x0, rtol=1e-5, atol=1e-5)
        seen.add(k)
    assert seen == {0, 1, 2, 3}


def test_a_chosen_timestep_is_told_and_pure_noise_given() -> None:
    method = a_matching(config(timestep=399))
    batch = both()
    assert batch.pairs is not None and isinstance(batch.pairs, PairBatch)
    x, conditioning = method.outputs(batch, Draw(1, (0,), range(ROWS), CPU))
    t = torch.full((ROWS,), 399)
    expected = x0_of(method.student(batch.pairs.noise, t, batch.conditioning), batch.pairs.noise, t, "epsilon")
    torch.testing.assert_close(x[ROWS:], expected, rtol=1e-5, atol=1e-6)
    assert conditioning.batch == 2 * ROWS and MEANS[0].shape == x.shape[1:]
