"""The discriminator: what it sees, how it is built, and that it learns what a discriminator must."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stages.diffusion.conditioning import Conditioning
from stages.diffusion.discriminator import (
    Discriminator,
    DiscriminatorHead,
    UNetEncoder,
    discriminator_loss,
    generator_loss,
    unet_discriminator,
)
from stages.diffusion.pipeline import TeacherPipeline
from tests import tiny_pipelines
from tests.architectures import SDXL
from tests.tiny_pipelines import UNet2DConditionModel

NOTHING = Conditioning(torch.zeros(1, 1, 1))


@pytest.mark.parametrize("kind", [*tiny_pipelines.KINDS, "ssd-1b"])
def test_features_are_those_of_the_mid_block_and_the_copy_is_its_own(kind: tiny_pipelines.Kind, tmp_path: Path) -> None:
    tiny_pipelines.save(kind, tmp_path)
    pipeline = TeacherPipeline.load(tmp_path)
    seen: dict[str, Tensor] = {}
    pipeline.unet.mid_block.register_forward_hook(lambda _module, _inputs, output: seen.update(mid=output))
    x, t, conditioning = torch.randn(2, *pipeline.latent_shape), torch.tensor([999, 3]), pipeline.conditioning(["a cat", "dog"])
    pipeline.denoiser()(x, t, conditioning)
    discriminator = unet_discriminator(pipeline.unet, pipeline.latent_shape, conditional=False, seed=1)
    assert torch.equal(discriminator.encoder(x, t, conditioning), seen["mid"])
    names = {name for name, _ in discriminator.encoder.named_parameters()}
    assert names and not any("up_blocks" in name or "conv_out" in name for name in names)
    assert len(pipeline.unet.up_blocks) == 2, "the teacher has lost its decoder"
    discriminator(x, t, x, t, conditioning).sum().backward()
    idle = {name for name, parameter in discriminator.named_parameters() if parameter.grad is None}
    assert not idle
    mine = {parameter.data_ptr() for parameter in discriminator.parameters()}
    assert mine.isdisjoint(parameter.data_ptr() for parameter in pipeline.unet.parameters())
    assert all(parameter.grad is None for parameter in pipeline.unet.parameters())


def test_a_unet_without_a_middle_is_looked_at_where_its_encoder_ends() -> None:
    unet = UNet2DConditionModel(**dict(tiny_pipelines.build("sd15").unet.config) | {"mid_block_type": None})
    assert unet.mid_block is None
    discriminator = unet_discriminator(unet, (4, 8, 8), conditional=True, seed=1)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([999, 3]), Conditioning(torch.randn(2, 5, 16))
    seen: dict[str, Tensor] = {}
    unet.down_blocks[-1].register_forward_hook(lambda _module, _inputs, output: seen.update(end=output[0]))
    unet(x, t, encoder_hidden_states=text.prompt_embeds)
    assert torch.equal(discriminator.encoder(x, t, text), seen["end"])
    assert discriminator(x, t, x, t, text).shape == (2,)


def test_a_head_is_a_function_of_its_seed() -> None:
    unet = tiny_pipelines.build("sd15").unet
    same, again, other = (unet_discriminator(unet, (4, 8, 8), conditional=True, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert {name.split(".")[0] for name in same if not torch.equal(same[name], other[name])} == {"head"}


@pytest.mark.parametrize(
    ("sides", "kernels"),
    [
        ((32, 32), [(4, 4)] * 4),  # SDXL at 1024 px: 32 -> 16 -> 8 -> 4 -> 1
        ((8, 8), [(4, 4)] * 2),  # SD1.5 at 512 px
        ((4, 4), [(4, 4)]),
        ((2, 2), [(2, 2)]),
        ((16, 24), [(4, 4)] * 3),
    ],
)
def test_a_head_is_as_deep_as_its_map_is_large(sides: tuple[int, int], kernels: list[tuple[int, int]]) -> None:
    head = DiscriminatorHead(64, *sides, 32)
    convolutions = [layer for layer in head if isinstance(layer, nn.Conv2d)]
    assert [layer.kernel_size for layer in convolutions] == [*kernels, (1, 1)]
    logits = head(torch.randn(3, 64, *sides))
    assert logits.shape == (3,)
    assert logits.std() > 0, "normalised to nothing"


def test_the_head_for_sdxl_is_dmd2s() -> None:
    with torch.device("meta"):
        head = DiscriminatorHead(2560, 32, 32, 1280)
    described = [(layer.stride, layer.padding) for layer in head if isinstance(layer, nn.Conv2d)]
    assert described == [((2, 2), (1, 1))] * 3 + [((4, 4), (0, 0)), ((1, 1), (0, 0))]
    assert [layer.num_groups for layer in head if isinstance(layer, nn.GroupNorm)] == [32] * 4


def test_it_fits_the_networks_of_sd15_sd2_and_sdxl() -> None:
    """Full size, on the meta device: shapes only."""
    for settings, side, text in (({"cross_attention_dim": 768}, 64, 768), ({"cross_attention_dim": 1024}, 96, 1024), (SDXL, 128, 2048)):
        with torch.device("meta"):
            unet = UNet2DConditionModel(sample_size=side, **settings)
            encoder = UNetEncoder(unet)
            mid = side // encoder.downscale
            discriminator = Discriminator(encoder, DiscriminatorHead(2 * encoder.channels, mid, mid, encoder.channels), conditional=True)
            x, t = torch.zeros(2, 4, side, side), torch.zeros(2, dtype=torch.long)
            pooled = (torch.zeros(2, 1280), torch.zeros(2, 6)) if "addition_embed_type" in settings else (None, None)
            assert discriminator(x, t, x, t, Conditioning(torch.zeros(2, 77, text), *pooled)).shape == (2,)


def test_losses_and_their_gradients_by_hand() -> None:
    real, fake = torch.tensor([0.3, -2.0], requires_grad=True), torch.tensor([1.5, -0.4], requires_grad=True)
    p, q = torch.sigmoid(real.detach()), torch.sigmoid(fake.detach())
    loss = discriminator_loss(real, fake)
    torch.testing.assert_close(loss.detach(), (-p.log() - (1 - q).log()).mean())
    loss.backward()
    torch.testing.assert_close(real.grad, (p - 1) / 2)
    torch.testing.assert_close(fake.grad, q / 2)
    fake.grad = None
    loss = generator_loss(fake)
    torch.testing.assert_close(loss.detach(), -q.log().mean())
    loss.backward()
    torch.testing.assert_close(fake.grad, (q - 1) / 2)
    assert torch.isfinite(discriminator_loss(torch.tensor([-1e4]), torch.tensor([1e4]))), "the logarithm of a saturated sigmoid"


class Quadratic(nn.Module):
    """A head linear in x and its products: it holds the log density ratio of any two Gaussians."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.places = torch.triu_indices(size, size)
        self.linear = nn.Linear(size + self.places.shape[1], 1)

    def forward(self, features: Tensor) -> Tensor:
        products = features[:, self.places[0]] * features[:, self.places[1]]
        logits: Tensor = self.linear(torch.cat([features, products], 1))
        return logits[:, 0]


def flat(x: Tensor, _timesteps: Tensor, _conditioning: Conditioning) -> Tensor:
    return x.flatten(1)


def fit(discriminator: Discriminator, real: Tensor, fake: Tensor, x_t: Tensor) -> None:
    """To the optimum: the problem is convex."""
    t = torch.zeros(len(real), dtype=torch.long)
    optimizer = torch.optim.LBFGS(discriminator.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    conditioning = NOTHING.expand(len(real))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = discriminator_loss(*(discriminator(x, t, x_t, t, conditioning) for x in (real, fake)))
        loss.backward()
        return loss

    optimizer.step(closure)


def test_between_two_gaussians_the_logit_is_the_log_density_ratio() -> None:
    torch.manual_seed(0)
    real, fake = torch.distributions.Normal(0.5, 1.0), torch.distributions.Normal(-0.3, 1.4)
    discriminator = Discriminator(flat, Quadratic(1), conditional=False)
    samples = 200_000
    fit(discriminator, real.sample((samples, 1)), fake.sample((samples, 1)), torch.zeros(samples, 1))
    x = torch.linspace(-2, 2.5, 40)[:, None]
    t = torch.zeros(40, dtype=torch.long)
    logit = discriminator(x, t, x, t, NOTHING.expand(40))
    torch.testing.assert_close(logit, (real.log_prob(x) - fake.log_prob(x))[:, 0], rtol=0.02, atol=0.03)


@pytest.mark.parametrize("conditional", [True, False])
def test_only_the_conditional_one_tells_the_teachers_own_result_from_another_of_the_same_marginal(conditional: bool) -> None:
    """x_s follows from x_t; a fake has the same marginal and belongs to another x_t. With correlation r the answer is known."""
    torch.manual_seed(0)
    samples, r = 100_000, 0.8
    x_t = torch.randn(samples, 1)
    real = r * x_t + (1 - r**2) ** 0.5 * torch.randn(samples, 1)
    fake = real.roll(1, 0)
    discriminator = Discriminator(flat, Quadratic(2 if conditional else 1), conditional=conditional)
    fit(discriminator, real, fake, x_t)
    t, conditioning = torch.zeros(samples, dtype=torch.long), NOTHING.expand(samples)
    with torch.no_grad():
        preferred = (discriminator(real, t, x_t, t, conditioning) > discriminator(fake, t, x_t, t, conditioning)).float().mean()
        if conditional:
            x = torch.randn(100, 2)
            joint = torch.distributions.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, r], [r, 1.0]]))
            apart = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
            logit = discriminator(x[:, :1], t[:100], x[:, 1:], t[:100], NOTHING.expand(100))
            torch.testing.assert_close(logit, joint.log_prob(x) - apart.log_prob(x), rtol=0.05, atol=0.05)
    assert preferred > 0.7 if conditional else abs(preferred - 0.5) < 0.02


@pytest.mark.parametrize("frozen", [False, True])
def test_x_t_is_looked_at_once_however_many_are_judged_given_it(frozen: bool) -> None:
    """Logits and gradients are those of judging each by itself; in the student's turn nothing flows back through x_t."""
    torch.manual_seed(0)
    layer, seen = nn.Linear(3, 4), []

    def encoder(x: Tensor, timesteps: Tensor, _conditioning: Conditioning) -> Tensor:
        features = torch.tanh(layer(torch.cat([x, timesteps[:, None] / 1000], 1)))
        seen.append((len(x), features.requires_grad))
        return features

    discriminator = Discriminator(encoder, nn.Sequential(nn.Linear(8, 1), nn.Flatten(0)), conditional=True)
    x_t, t, s = torch.randn(5, 2), torch.full((5,), 800), torch.full((5,), 300)
    real, fake = torch.randn(5, 2), torch.randn(5, 2, requires_grad=frozen)
    conditioning = NOTHING.expand(5)
    apart = torch.cat([discriminator(x, s, x_t, t, conditioning) for x in (real, fake)])
    wanted = fake if frozen else layer.weight
    (expected,) = torch.autograd.grad(apart.square().sum(), wanted)
    seen.clear()
    layer.requires_grad_(not frozen)
    together = discriminator(torch.cat([real, fake]), s.repeat(2), x_t, t, conditioning)
    (found,) = torch.autograd.grad(together.square().sum(), wanted)
    assert seen == ([(10, True), (5, False)] if frozen else [(15, True)])
    torch.testing.assert_close(together, apart)
    torch.testing.assert_close(found, expected)
