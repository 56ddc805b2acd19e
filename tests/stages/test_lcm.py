"""Latent consistency distillation: the loss against the paper's formulas by hand and diffusers' DDIM, anchors, exact resume, files."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from schemas.errors import BadInput
from schemas.manifest import Latents, Manifest, Teacher
from schemas.training import OptimizerConfig
from stages import lcm
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.lora import add_lora, lora_layers, without_lora
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.solvers import boundary_scalings, ddim_move
from stages.training import Draw, train
from stages.training.latent_batches import LatentBatch, reader
from tests.stages.consistent import NULL, a_method, config
from tests.stages.mixtures import BETAS, CPU, SCHEDULE, SHAPE, MixtureSet
from tests.tiny_pipelines import DDIMScheduler
from tests.training import artifacts
from tests.training.killing import killed_and_resumed
from tests.training.toys import make_workspace


def test_boundary_scalings_have_their_anchors() -> None:
    scalings = boundary_scalings(torch.tensor([0, 1, 19, 999]))
    assert scalings.c_skip.flatten().tolist() == pytest.approx([1, 0.00249, 6.9e-6, 2.5e-9], rel=5e-3)
    assert scalings.c_out.flatten().tolist() == pytest.approx([0, 0.99875, 1, 1], rel=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("distance", ["l2", "huber"])
def test_the_loss_is_the_papers(kind: str, distance: str) -> None:
    """Every quantity again, sample by sample in float64, with the solver's step taken by diffusers' DDIMScheduler."""
    settings = config(loss=distance)
    method, student, teacher = a_method(settings, kind)
    rows = 48
    latents, conditioning = MixtureSet().samples(list(range(rows)))
    draw = Draw(5, (0,), range(rows), CPU)
    prepared = method.prepare(LatentBatch(latents, conditioning), draw)
    ours = method.loss("student", prepared, draw)["loss"]

    scheduler = DDIMScheduler(**BETAS, prediction_type="epsilon", clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    grid = [20 * n - 1 for n in range(1, 51)]
    later = [grid[n] for n in draw.integers("timestep", 50).tolist()]
    eps = draw.normal("noise", SHAPE)
    w, sd, s, c = 7.5, 0.5, 10.0, 0.001

    def read(network: object, x: Tensor, t: int, condition: Conditioning) -> tuple[Tensor, Tensor]:
        """x0 and eps from the raw output, by the definitions."""
        output = network(x, torch.tensor([t]), condition).double()  # type: ignore[operator]
        a, b = SCHEDULE.alphas_cumprod[t].sqrt(), (1 - SCHEDULE.alphas_cumprod[t]).sqrt()
        if kind == "epsilon":
            return (x - b * output) / a, output
        if kind == "v_prediction":
            return a * x - b * output, b * x + a * output
        return output, (x - a * output) / b

    def f(x: Tensor, t: int, condition: Conditioning) -> Tensor:
        c_skip, c_out = sd**2 / ((s * t) ** 2 + sd**2), s * t / ((s * t) ** 2 + sd**2) ** 0.5
        return c_skip * x + c_out * read(student, x, t, condition)[0]

    losses = []
    for row in range(rows):
        t, condition = later[row], conditioning[row]
        abar = SCHEDULE.alphas_cumprod[t]
        z = (abar.sqrt() * latents[row] + (1 - abar).sqrt() * eps[row])[None].float()
        _, with_text = read(teacher, z, t, condition)
        _, without = read(teacher, z, t, NULL)
        moved = scheduler.step(with_text + w * (with_text - without), t, z.double(), return_dict=False)[0].float()
        earlier = max(t - 20, 0)
        with torch.no_grad():
            difference = f(z, t, condition) - f(moved, earlier, condition)
        losses.append(difference.square().mean() if distance == "l2" else ((difference.square() + c**2).sqrt() - c).mean())
    assert 19 in later, "the clipped end of the grid is not covered"
    torch.testing.assert_close(ours.double(), torch.stack(losses).mean(), rtol=1e-4, atol=1e-7)


def test_no_gradient_flows_through_the_target() -> None:
    method, student, _ = a_method(config(loss="l2"), "epsilon")
    draw = Draw(5, (0,), range(8), CPU)
    with torch.no_grad():
        prepared = method.prepare(LatentBatch(*MixtureSet().samples(list(range(8)))), draw)
    assert not prepared.target.requires_grad
    method.loss("student", prepared, draw)["loss"].backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_a_small_student_becomes_consistent(tmp_path: Path) -> None:
    """Trained without guidance on the exact score, one call lands near the end of the ODE."""
    settings = config(
        guidance_w=0.0,
        loss="l2",
        training_steps=400,
        batch_size=128,
        checkpoint_every=400,
        warmup_steps=20,
        lr_schedule="cosine",
        optimizer=OptimizerConfig(learning_rate=5e-3),
    )
    method, student, teacher = a_method(settings, "sample")
    data = MixtureSet()
    conditioning = data.samples(list(range(64)))[1]
    x = noise = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(9))
    timesteps = [*range(999, 0, -20), 0]
    for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
        x = ddim_move(teacher, x, torch.full((64,), t), torch.full((64,), s), conditioning)
    last = torch.full((64,), 999)
    with torch.no_grad():
        before = (method.consistency_function(student, noise, last, conditioning) - x).square().mean()
    train(method, reader(data), len(data), settings, make_workspace(tmp_path), seed=1)
    with torch.no_grad():
        after = (method.consistency_function(student, noise, last, conditioning) - x).square().mean()
    assert after < 0.1 * before
    assert after < 0.1 * x.var()


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest[Teacher], Manifest[Latents]]:
    folder = tmp_path_factory.mktemp("sdxl")
    teacher = artifacts.make_teacher(folder, "sdxl")
    return folder, teacher, artifacts.make_latents(folder, teacher)


@pytest.mark.slow
def test_killed_in_the_middle_it_ends_with_the_same_files(sdxl: tuple[Path, Manifest[Teacher], Manifest[Latents]], tmp_path: Path) -> None:
    settings = config(training_steps=20, checkpoint_every=5)
    folder, teacher, latents = sdxl
    inputs = lcm.Inputs(teacher=teacher, latents=latents)
    whole = lcm.run(settings, inputs, artifacts.workspace(folder, config=settings))
    shutil.copytree(folder / "store", tmp_path / "store", ignore=shutil.ignore_patterns(f"{whole.identity}*"))
    assert killed_and_resumed(tmp_path, "lcm", settings, inputs, "checkpoint-00000010").files == whole.files


@pytest.mark.parametrize("kind", ["sd15", "sd2-v"])
def test_every_kind_of_teacher_gets_its_lora(tmp_path: Path, kind: str) -> None:
    teacher = artifacts.make_teacher(tmp_path, kind)  # type: ignore[arg-type]
    latents = artifacts.make_latents(tmp_path, teacher)
    settings = config(training_steps=3, gradient_checkpointing=True, precision="bfloat16")
    student = lcm.run(settings, lcm.Inputs(teacher=teacher, latents=latents), artifacts.workspace(tmp_path, config=settings))
    assert student.content.timesteps[4] == (999, 759, 499, 259)
    assert student.content.prediction_type == teacher.content.prediction_type
    path = artifacts.open_store(tmp_path).fetch(student) / "pytorch_lora_weights.safetensors"
    with safe_open(path, framework="pt") as file:
        trained = [float(file.get_tensor(name).abs().max()) for name in file.keys() if ".lora_B." in name]  # noqa: SIM118
    assert all(value > 0 for value in trained)


def test_the_teacher_is_the_base_without_its_adapter(sdxl: tuple[Path, Manifest[Teacher], Manifest[Latents]]) -> None:
    folder, teacher, latents = sdxl
    pipeline = TeacherPipeline.load(artifacts.open_store(folder).fetch(teacher))
    x, t = torch.randn(2, *pipeline.latent_shape), torch.tensor([999, 19])
    conditioning = pipeline.conditioning(["cat", "dog"])
    with torch.no_grad():
        base = pipeline.denoiser()(x, t, conditioning)
        for parameter in add_lora(pipeline.unet, 4, 8, seed=1):
            parameter.add_(0.1)
        adapted = pipeline.denoiser()(x, t, conditioning)
        with without_lora(lora_layers(pipeline.unet)):
            assert torch.equal(pipeline.denoiser()(x, t, conditioning), base)
        assert torch.equal(pipeline.denoiser()(x, t, conditioning), adapted)
    assert not torch.equal(adapted, base)
    assert all(parameter.requires_grad == (".lora_" in name) for name, parameter in pipeline.unet.named_parameters())
    with pytest.raises(BadInput, match="latents: made with the teacher"):
        settings = config()
        other = teacher.model_copy(update={"identity": "0" * 64})
        lcm.run(settings, lcm.Inputs(teacher=other, latents=latents), artifacts.workspace(folder, config=settings))
