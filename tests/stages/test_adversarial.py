"""The adversarial link on a teacher whose score is known."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from schemas.adversarial import AdversarialConfig
from schemas.lightning import LinkConfig, trailing_timesteps
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.discriminator import Discriminator
from stages.diffusion.prediction import PREDICTION_TYPES
from stages.diffusion.schedule import CLEAN
from stages.diffusion.solvers import ddim_moves, ddim_step
from stages.lightning.adversarial import DISCRIMINATOR, STUDENT, AdversarialLink, Judged
from stages.training import Draw, train
from stages.training.figures import scalars, to_host
from stages.training.latent_batches import LatentBatch, reader
from tests.stages.mixtures import CPU, MEANS, SCHEDULE, MixtureSet
from tests.stages.test_lightning import LinearStudent, SmallStudent, config, in_training, mixture
from tests.training.toys import make_workspace

STARTS = (999, 749, 499, 249)


class SmallEncoder(nn.Module):
    """Features of x and its timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(MEANS[0].numel() + 1, 32), nn.Tanh())

    def forward(self, x: Tensor, timesteps: Tensor, _conditioning: Conditioning) -> Tensor:
        features: Tensor = self.layers(torch.cat([x.flatten(1), timesteps[:, None] / 1000], 1))
        return features


def small_discriminator(conditional: bool = True) -> Discriminator:
    torch.manual_seed(5)
    head = nn.Sequential(nn.Linear(64 if conditional else 32, 32), nn.Tanh(), nn.Linear(32, 1), nn.Flatten(0))
    return Discriminator(SmallEncoder(), head, conditional=conditional)


def a_link(settings: LinkConfig, kind: str = "epsilon") -> AdversarialLink:
    assert settings.adversarial is not None
    student = SmallStudent(settings.start_timesteps or trailing_timesteps(settings.steps), PREDICTION_TYPES[kind])
    return AdversarialLink(
        settings,
        teacher=mixture(),
        student=in_training(student),
        discriminator=small_discriminator(settings.adversarial.conditional),
    )


def settings(teacher_steps: int = 8, steps: int = 4, starts: tuple[int, ...] | None = None, **adversarial: object) -> LinkConfig:
    return config(teacher_steps, steps, start_timesteps=starts, adversarial=AdversarialConfig.model_validate(adversarial))


def prepared(link: AdversarialLink, samples: int = 64, step: int = 0) -> tuple[Judged, Tensor]:
    latents, conditioning = MixtureSet().samples(list(range(samples)))
    with torch.no_grad():
        return link.prepare(LatentBatch(latents, conditioning), Draw(1, (step,), range(samples), CPU)), latents


@pytest.mark.parametrize("starts", [None, STARTS])
def test_the_real_one_is_where_the_teachers_moves_end(starts: tuple[int, ...] | None) -> None:
    link = a_link(settings(8, 2, starts))
    made, _ = prepared(link)
    sample = made.sample
    expected = ddim_moves(link.teacher, sample.x_t, sample.timesteps, sample.conditioning)
    torch.testing.assert_close(made.real, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(made.level, sample.timesteps[-1])
    assert set(sample.timesteps[0].tolist()) == set(starts or (999, 499))
    assert made.eps is None


def test_the_students_jump_is_judged_at_the_same_place() -> None:
    link = a_link(settings())
    made, _ = prepared(link)
    sample, seen = made.sample, []
    link.discriminator.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs))
    draw = Draw(1, (0,), range(64), CPU)
    link.loss(DISCRIMINATOR, made, draw)
    link.loss(STUDENT, made, draw)
    eps = link.student(sample.x_t, sample.timesteps[0], sample.conditioning)
    alpha, sigma = SCHEDULE.alpha_sigma(sample.timesteps[0])
    jumped = ddim_step((sample.x_t - sigma * eps) / alpha, eps, *SCHEDULE.alpha_sigma(made.level))
    assert torch.equal(seen[0][0][:64], made.real)
    for fake in (seen[0][0][64:], seen[1][0]):
        torch.testing.assert_close(fake, jumped, rtol=1e-5, atol=1e-5)
    for x_s, s, x_t, t, conditioning in seen:
        copies = len(x_s) // 64
        assert torch.equal(s, made.level.repeat(copies)) and t is sample.timesteps[0]
        assert x_t is sample.x_t and conditioning is sample.conditioning


def test_renoised_predictions_share_their_noise_and_level() -> None:
    link = a_link(settings(4, 1, STARTS, renoise_timesteps=(10, 249, 499, 749)))
    made, _ = prepared(link, 256)
    assert made.eps is not None
    assert set(made.level.tolist()) == {10, 249, 499, 749}
    alpha, sigma = SCHEDULE.alpha_sigma(made.level)
    teachers_x0 = (made.real - sigma * made.eps) / alpha
    ends = ddim_moves(link.teacher, made.sample.x_t, made.sample.timesteps, made.sample.conditioning)
    assert set(made.sample.timesteps[-1].tolist()) == {CLEAN}
    torch.testing.assert_close(teachers_x0, ends, rtol=1e-3, atol=1e-3)
    fakes: list[Tensor] = []
    link.discriminator.register_forward_pre_hook(lambda _module, inputs: fakes.append(inputs[0]))
    link.loss(STUDENT, made, Draw(1, (0,), range(256), CPU))
    eps = link.student(made.sample.x_t, made.sample.timesteps[0], made.sample.conditioning)
    alpha_t, sigma_t = SCHEDULE.alpha_sigma(made.sample.timesteps[0])
    expected = alpha * (made.sample.x_t - sigma_t * eps) / alpha_t + sigma * made.eps
    torch.testing.assert_close(fakes[0], expected, rtol=1e-4, atol=1e-4)


class LinearEncoder(nn.Module):
    """E x at every timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(MEANS[0].numel(), 6, bias=False)

    def forward(self, x: Tensor, _timesteps: Tensor, _conditioning: Conditioning) -> Tensor:
        features: Tensor = self.linear(x.flatten(1))
        return features


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("levels", [(), (10, 249, 499, 749)])
def test_gradients_through_jump_re_noising_and_discriminator_by_hand(levels: tuple[int, ...], conditional: bool) -> None:
    """All networks linear: the output is W x_t + b, the logit h_s . E x_s + h_t . E x_t + h_0.

    x_s is linear in the output, with the slope g = sigma_s - alpha_s sigma_t / alpha_t of DDIM's move, or re-noised -alpha_* sigma_t / alpha_t. So
    dL_G/dW = sum_b -(1 - p_b)/B g_b (E^T h_s) x_t,b^T, and L_D's gradients are sums of -(1 - p) real and q fake.
    """
    chosen = (
        settings(4, 1, STARTS, renoise_timesteps=levels, conditional=conditional) if levels else settings(8, 4, conditional=conditional)
    )
    student = LinearStudent()
    last = nn.Linear(12 if conditional else 6, 1)
    discriminator = Discriminator(LinearEncoder(), nn.Sequential(last, nn.Flatten(0)), conditional=conditional)
    link = AdversarialLink(chosen, teacher=mixture(), student=in_training(student), discriminator=discriminator)
    made, _ = prepared(link)
    assert (made.eps is not None) == bool(levels)

    encoder = discriminator.encoder.linear.weight
    w, b, e, h, h_0 = (each.detach().double() for each in (student.linear.weight, student.linear.bias, encoder, last.weight[0], last.bias))
    h_s, h_t = h[:6], h[6:] if conditional else torch.zeros(6, dtype=torch.float64)
    x_t, real = made.sample.x_t.flatten(1).double(), made.real.flatten(1).double()
    abar = torch.cat([SCHEDULE.alphas_cumprod.double(), torch.ones(1, dtype=torch.float64)])  # the clean state's, -1, at the end
    of = [(abar[at].sqrt()[:, None], (1 - abar[at]).sqrt()[:, None]) for at in (made.sample.timesteps[0], made.level)]
    (alpha_t, sigma_t), (alpha_s, sigma_s) = of
    eps = x_t @ w.T + b
    added = eps if made.eps is None else made.eps.flatten(1).double()
    fake = alpha_s * (x_t - sigma_t * eps) / alpha_t + sigma_s * added
    slope = -alpha_s * sigma_t / alpha_t + (sigma_s if made.eps is None else 0)
    p, q = (torch.sigmoid(x_s @ e.T @ h_s + x_t @ e.T @ h_t + h_0)[:, None] for x_s in (real, fake))

    of_fake = -(1 - q) / len(q) * (e.T @ h_s)
    check(
        link,
        made,
        STUDENT,
        -q.log().mean(),
        {student.linear.weight: (slope * of_fake).T @ x_t, student.linear.bias: (slope * of_fake).sum(0)},
    )
    of_real, of_fake = -(1 - p) / len(p), q / len(q)  # of the logits
    moved, seen = (of_real * real + of_fake * fake).sum(0), ((of_real + of_fake) * x_t).sum(0)
    expected = {
        encoder: torch.outer(h_s, moved) + torch.outer(h_t, seen),
        last.weight: torch.cat([e @ moved, *([e @ seen] if conditional else [])])[None],
        last.bias: (of_real + of_fake).sum(0),
    }
    check(link, made, DISCRIMINATOR, -(p.log() + (1 - q).log()).mean(), expected)


def check(link: AdversarialLink, made: Judged, player: str, loss: Tensor, gradients: dict[nn.Parameter, Tensor]) -> None:
    """A player's loss and all its gradients."""
    found = link.loss(player, made, Draw(1, (0,), range(64), CPU))["loss"]
    assert isinstance(found, Tensor)
    assert float(found.detach()) == pytest.approx(float(loss), rel=1e-4)
    assert set(gradients) == set(link.players[player].parameters.values())
    for parameter, gradient in zip(gradients, torch.autograd.grad(found, list(gradients)), strict=True):
        expected = gradients[parameter]
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("step", "share"), [(0, 1 / 4), (4, 5 / 8)])
def test_levels_are_drawn_by_the_weights_of_the_step(step: int, share: float) -> None:
    link = a_link(settings(4, 1, STARTS, renoise_timesteps=(10, 249, 499, 749)))
    drawn = torch.cat([link._levels(Draw(seed, (step,), range(512), CPU)) for seed in range(8)])
    counts = torch.stack([(drawn == level).float().mean() for level in (10, 249, 499, 749)])
    torch.testing.assert_close(counts, torch.tensor([share, *[(1 - share) / 3] * 3]), atol=0.03, rtol=0)


def test_a_student_that_is_the_teacher_cannot_be_told_apart() -> None:
    """One jump of n = 1 is the teacher's own move: logits agree pairwise, and the losses are those of a coin at any discriminator."""
    link = a_link(settings(4, 4))
    link.student = link.teacher
    made, _ = prepared(link)
    draw = Draw(1, (0,), range(64), CPU)
    figures = link.loss(DISCRIMINATOR, made, draw)
    assert float(figures["real_accuracy"] + figures["fake_accuracy"]) == pytest.approx(1)
    real = link._logits(made.real, made)
    torch.testing.assert_close(figures["loss"], (nn.functional.softplus(-real) + nn.functional.softplus(real)).mean(), rtol=1e-4, atol=1e-5)


def test_each_players_gradient_reaches_its_own_parameters(tmp_path: Path) -> None:
    chosen = settings().model_copy(update={"training_steps": 3, "batch_size": 8})
    link = a_link(chosen)
    before = {name: {key: value.clone() for key, value in tensors.items()} for name, tensors in link.state().items()}
    rows = train(link, reader(MixtureSet()), 512, chosen, make_workspace(tmp_path), seed=1)
    assert set(before) == {STUDENT, DISCRIMINATOR} == set(link.players)
    assert list(link.turns(0)) == [DISCRIMINATOR, STUDENT]
    for name, tensors in link.state().items():
        assert not any(torch.equal(before[name][key], value) for key, value in tensors.items() if value.is_floating_point()), name
    told, levels = {"loss", "grad_norm", "learning_rate"}, ("clean", "249", "499", "749")
    assert {key for key in rows[0] if key != "step"} == {
        *(f"{DISCRIMINATOR}.{figure}" for figure in told | {"real_accuracy", "fake_accuracy"}),
        *(f"{DISCRIMINATOR}.{which}_accuracy_at_{level}" for which in ("real", "fake") for level in levels),
        *(f"{STUDENT}.{figure}" for figure in told | {"x0_mean", "x0_std", "reference_mean", "reference_std"}),
    }


def test_accuracy_is_told_by_the_level_that_is_judged(tmp_path: Path) -> None:
    """Each level's share over its own samples; together they are the whole batch's. Most steps of a small batch lack a level: no figure there."""
    levels = (10, 249, 499, 749)
    chosen = settings(4, 1, STARTS, renoise_timesteps=levels).model_copy(update={"training_steps": 6, "batch_size": 3})
    link = a_link(chosen)
    seen: list[tuple[Tensor, Tensor]] = []
    both = link._logits

    def overheard(x_s: Tensor, made: Judged) -> Tensor:
        logits = both(x_s, made)
        if len(x_s) == 2 * len(made.level):  # the discriminator's turn: real and fake
            seen.append((made.level, logits.detach().chunk(2)[1]))
        return logits

    link._logits = overheard  # type: ignore[method-assign]
    rows = train(link, reader(MixtureSet()), 512, chosen, make_workspace(tmp_path), seed=1)
    for row, (level, logits) in zip(rows, seen, strict=True):
        for one in levels:
            here = logits[level == one]
            expected = pytest.approx(float((here < 0).float().mean())) if len(here) else None
            assert row.get(f"discriminator.fake_accuracy_at_{one}") == expected
    assert any(set(level.tolist()) != set(levels) for level, _ in seen)


def test_the_reference_is_what_a_perfect_student_would_say() -> None:
    """With n = 1 the student that is the teacher jumps as the teacher does: both have the same x0, and so the same mean and deviation."""
    for chosen in (settings(4, 4), settings(1, 1, renoise_timesteps=(10, 249, 499, 749))):
        link = a_link(chosen)
        link.student = link.teacher
        made, _ = prepared(link)
        figures = to_host(scalars(link.loss(STUDENT, made, Draw(1, (0,), range(64), CPU))))
        assert figures["x0_std"] == pytest.approx(figures["reference_std"], rel=1e-4)
        assert figures["x0_mean"] == pytest.approx(figures["reference_mean"], abs=1e-4)


@pytest.mark.parametrize("conditional", [True, False])
def test_it_brings_a_displaced_student_back(tmp_path: Path, conditional: bool) -> None:
    """Real samples come from the teacher; a student that starts displaced is drawn to them, by the discriminator's word alone."""
    chosen = settings(8, 4, conditional=conditional, optimizer={"learning_rate": 4e-3, "betas": (0, 0.99)}).model_copy(
        update={"training_steps": 400, "batch_size": 64, "checkpoint_every": 400}
    )
    chosen = chosen.model_copy(update={"optimizer": chosen.optimizer.model_copy(update={"learning_rate": 2e-3, "betas": (0.0, 0.99)})})
    link = a_link(chosen, "sample")

    def displacement() -> float:
        made, _ = prepared(link, 512)
        with torch.no_grad():
            fake = link._fake(made, link_prediction(link, made))
        return float((fake.mean(0) - made.real.mean(0)).square().sum().sqrt())

    before = displacement()
    train(link, reader(MixtureSet()), 512, chosen, make_workspace(tmp_path), seed=1)
    assert displacement() < 0.5 * before


def link_prediction(link: AdversarialLink, made: Judged) -> object:
    from stages.diffusion.denoiser import predict

    return predict(link.student, made.sample.x_t, made.sample.timesteps[0], made.sample.conditioning)
