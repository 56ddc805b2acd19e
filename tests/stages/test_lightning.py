"""Progressive distillation: targets against diffusers' own scheduler and closed forms, the chain on tiny pipelines, exact resume."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from schemas.errors import BadInput
from schemas.lightning import LightningConfig, LinkConfig, trailing_timesteps
from schemas.manifest import Latents, Manifest, StudentManifest, Teacher
from schemas.training import OptimizerConfig
from stages import lightning
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.exact import GaussianMixtureDenoiser
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.prediction import PREDICTION_TYPES, PredictionType
from stages.diffusion.schedule import CLEAN, NoiseSchedule
from stages.diffusion.solvers import ddim_moves
from stages.lightning.grid import teacher_moves
from stages.lightning.regression import ProgressiveLink, SampleSwitch
from stages.students import Student, load_student
from stages.training import Draw, train
from stages.training.latent_batches import LatentBatch, reader
from stages.training.metrics import read_metrics
from tests.stages.mixtures import BETAS, CPU, MEANS, SCHEDULE, SHAPE, MixtureSet, classes
from tests.tiny_pipelines import DDIMScheduler, UNet2DConditionModel
from tests.training import artifacts
from tests.training.killing import killed_and_resumed
from tests.training.toys import make_workspace

ADAM = OptimizerConfig(learning_rate=1e-3)


def config(teacher_steps: int, steps: int, **more: object) -> LinkConfig:
    settings: dict[str, object] = {"teacher_steps": teacher_steps, "steps": steps, "optimizer": ADAM, "training_steps": 5, "batch_size": 4}
    return LinkConfig.model_validate(settings | more)


def mixture(kind: str = "epsilon") -> GaussianMixtureDenoiser:
    return GaussianMixtureDenoiser(MEANS, 0.3, schedule=SCHEDULE, prediction=PREDICTION_TYPES[kind], by_class=True)


class SmallStudent(nn.Module):
    """Predicts in any type with a network of its own for each timestep of a grid: enough to fit one jump."""

    def __init__(self, grid: tuple[int, ...], prediction: PredictionType) -> None:
        super().__init__()
        torch.manual_seed(0)
        size = MEANS[0].numel()
        self.grid = grid
        self.networks = nn.ModuleList(nn.Sequential(nn.Linear(size + 3, 64), nn.Tanh(), nn.Linear(64, size)) for _ in grid)
        self._prediction = prediction

    @property
    def schedule(self) -> NoiseSchedule:
        return SCHEDULE

    @property
    def prediction(self) -> PredictionType:
        return self._prediction

    def forward(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        one_hot = nn.functional.one_hot(conditioning.prompt_embeds[:, 0, 0].long(), 3).float()
        inputs = torch.cat([x_t.flatten(1), one_hot], 1)
        outputs = torch.stack([network(inputs) for network in self.networks])
        place = torch.tensor([self.grid.index(t) for t in timesteps.tolist()])
        return outputs[place, torch.arange(len(x_t))].reshape(x_t.shape)


class LinearStudent(nn.Module):
    """W x_t + b, at every timestep: its gradients can be written down."""

    def __init__(self, kind: str = "epsilon") -> None:
        super().__init__()
        torch.manual_seed(6)
        self.linear = nn.Linear(MEANS[0].numel(), MEANS[0].numel())
        self.schedule, self.prediction = SCHEDULE, PREDICTION_TYPES[kind]

    def forward(self, x_t: Tensor, _timesteps: Tensor, _conditioning: Conditioning) -> Tensor:
        output: Tensor = self.linear(x_t.flatten(1)).reshape(x_t.shape)
        return output


def in_training(network: Any) -> Student:
    return Student(network, dict(network.named_parameters()), network.state_dict())


def a_link(settings: LinkConfig, kind: str = "epsilon", unconditional: Conditioning | None = None) -> tuple[ProgressiveLink, SmallStudent]:
    student = SmallStudent(trailing_timesteps(settings.steps), PREDICTION_TYPES[kind])
    return ProgressiveLink(settings, teacher=mixture(kind), student=in_training(student), unconditional=unconditional), student


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("teacher_steps", "steps", "scale"), [(128, 32, 6.0), (8, 4, 1.0), (8, 2, 1.0), (4, 1, 1.0)])
def test_the_target_is_ddim_of_diffusers(kind: str, teacher_steps: int, steps: int, scale: float) -> None:
    settings = config(teacher_steps, steps, guidance_scale=scale)
    teacher = mixture(kind)
    link, _ = a_link(settings, kind, classes(torch.tensor([-1])) if scale > 1 else None)
    latents, conditioning = MixtureSet().samples(list(range(24)))
    made = link.prepare(LatentBatch(latents, conditioning), Draw(1, (0,), range(24), CPU))
    scheduler = DDIMScheduler(**BETAS, prediction_type=kind, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(teacher_steps)
    assert tuple(scheduler.timesteps.tolist()) == trailing_timesteps(teacher_steps)
    for row in range(24):
        start = int(made.sample.timesteps[0][row])
        first = scheduler.timesteps.tolist().index(start)
        x = made.sample.x_t[row : row + 1]
        for t, s in zip(range(first, first + teacher_steps // steps), made.sample.timesteps[1:], strict=True):
            timestep = scheduler.timesteps[t]
            output = teacher(x, timestep.reshape(1), conditioning[row])
            if scale > 1:
                empty = teacher(x, timestep.reshape(1), classes(torch.tensor([-1])))
                output = empty + scale * (output - empty)
            following = ([*scheduler.timesteps.tolist(), CLEAN])[t + 1]
            assert int(s[row]) == following
            # DDIMScheduler moves by 1000 // N, which leaves the grid where N is no divisor of 1000: tell it the N of this one move.
            scheduler.num_inference_steps = 1000 // (int(timestep) - following)
            x = scheduler.step(output, int(timestep), x, return_dict=False)[0]
        torch.testing.assert_close(made.target[row : row + 1], x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_gradient_through_the_jump_by_hand(kind: str) -> None:
    """dL/dW = sum_b 2/(B D) g_b (x_hat_s - x_s)_b x_t,b^T: x_hat_s is linear in the output, with the slope g that DDIM's move gives it."""
    settings = config(8, 4)
    student = LinearStudent(kind)
    link = ProgressiveLink(settings, teacher=mixture(kind), student=in_training(student))
    latents, conditioning = MixtureSet().samples(list(range(32)))
    draw = Draw(1, (0,), range(32), CPU)
    with torch.no_grad():
        made = link.prepare(LatentBatch(latents, conditioning), draw)
    loss = link.loss("student", made, draw)["loss"]
    assert isinstance(loss, Tensor)
    loss.backward()

    x_t, t, s = made.sample.x_t.flatten(1).double(), made.sample.timesteps[0], made.sample.timesteps[-1]
    assert CLEAN in s.tolist()
    abar = torch.cat([SCHEDULE.alphas_cumprod.double(), torch.ones(1, dtype=torch.float64)])  # the clean state's, -1, at the end
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ((abar[at].sqrt()[:, None], (1 - abar[at]).sqrt()[:, None]) for at in (t, s))
    output = x_t @ student.linear.weight.detach().double().T + student.linear.bias.detach().double()
    of_input, slope = {
        "epsilon": (alpha_s / alpha_t, sigma_s - alpha_s * sigma_t / alpha_t),
        "sample": (sigma_s / sigma_t, alpha_s - sigma_s * alpha_t / sigma_t),
        "v_prediction": (alpha_s * alpha_t + sigma_s * sigma_t, sigma_s * alpha_t - alpha_s * sigma_t),
    }[kind]
    off = of_input * x_t + slope * output - made.target.flatten(1).double()
    assert float(loss.detach()) == pytest.approx(float(off.square().mean()), rel=1e-4)
    of_output = 2 / off.numel() * slope * off
    weight, bias = of_output.T @ x_t, of_output.sum(0)
    for found, expected in ((student.linear.weight.grad, weight), (student.linear.bias.grad, bias)):
        assert found is not None
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_at_the_last_timestep_the_input_is_pure_noise_and_elsewhere_it_is_the_forward_process() -> None:
    link, _ = a_link(config(8, 4))
    latents, conditioning = MixtureSet().samples(list(range(64)))
    draw = Draw(1, (0,), range(64), CPU)
    sample = link.prepare(LatentBatch(latents, conditioning), draw).sample
    eps = draw.normal("noise", SHAPE)
    t = sample.timesteps[0]
    assert set(t.tolist()) == {999, 749, 499, 249}
    assert torch.equal(sample.x_t[t == 999], eps[t == 999])
    below = t < 999
    assert torch.equal(sample.x_t[below], SCHEDULE.add_noise(latents[below], eps[below], t[below]))


def test_moves_follow_the_grids_to_the_clean_state() -> None:
    moves = teacher_moves(128, 32, 1000)
    assert moves.shape == (32, 5)
    assert moves[0].tolist() == [999, 991, 983, 976, 968]
    assert moves[-1].tolist()[-1] == CLEAN
    assert torch.equal(moves[1:, 0], moves[:-1, -1])
    assert teacher_moves(2, 1, 1000).tolist() == [[999, 499, CLEAN]]
    with pytest.raises(ValueError, match="grid of 3 steps does not nest in that of 8"):
        teacher_moves(8, 3, 1000)


def test_from_timesteps_off_its_grid_a_student_jumps_as_far_and_no_further_than_the_clean_state() -> None:
    assert teacher_moves(4, 1, 1000, (999, 749, 499, 249)).tolist() == [
        [999, 749, 499, 249, CLEAN],
        [749, 499, 249, CLEAN, CLEAN],
        [499, 249, CLEAN, CLEAN, CLEAN],
        [249, CLEAN, CLEAN, CLEAN, CLEAN],
    ]
    assert teacher_moves(8, 2, 1000, (749, 249)).tolist() == [[749, 624, 499, 374, 249], [249, 124, CLEAN, CLEAN, CLEAN]]
    with pytest.raises(ValueError, match=r"timesteps \[250\]: expected entries of the teacher's trailing grid of 4 steps"):
        teacher_moves(4, 1, 1000, (250,))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_teacher_that_has_arrived_stays(kind: str) -> None:
    settings = config(4, 1, start_timesteps=(999, 749, 499, 249))
    link, _ = a_link(settings, kind)
    latents, conditioning = MixtureSet().samples(list(range(32)))
    made = link.prepare(LatentBatch(latents, conditioning), Draw(1, (0,), range(32), CPU))
    assert set(made.sample.timesteps[0].tolist()) == {999, 749, 499, 249}
    for row in range(32):
        moves = [t[row : row + 1] for t in made.sample.timesteps if int(t[row]) != CLEAN] + [torch.tensor([CLEAN])]
        alone = ddim_moves(link.teacher, made.sample.x_t[row : row + 1], moves, conditioning[row])
        torch.testing.assert_close(made.target[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_the_loss_is_taken_after_the_jump() -> None:
    """With the teacher as its student, one jump of n = 1 is the teacher's move: the loss is zero; and a known error of eps gives a known loss."""
    settings = config(4, 4)
    link, _ = a_link(settings)
    batch = LatentBatch(*MixtureSet().samples(list(range(16))))
    made = link.prepare(batch, Draw(1, (0,), range(16), CPU))
    link.student = link.teacher
    assert float(link.loss("student", made, Draw(1, (0,), range(16), CPU))["loss"]) < 1e-10

    class Wrong(GaussianMixtureDenoiser):
        def __call__(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning | None = None) -> Tensor:
            return super().__call__(x_t, timesteps, conditioning) + 0.01

    link.student = Wrong(MEANS, 0.3, schedule=SCHEDULE, by_class=True)
    alpha, sigma = SCHEDULE.alpha_sigma(made.sample.timesteps[0])
    alpha_s, sigma_s = SCHEDULE.alpha_sigma(made.sample.timesteps[-1])
    expected = (0.01 * (sigma_s - alpha_s * sigma / alpha)).square().mean()
    torch.testing.assert_close(link.loss("student", made, Draw(1, (0,), range(16), CPU))["loss"], expected, rtol=1e-3, atol=0)


def test_a_small_student_learns_the_jump(tmp_path: Path) -> None:
    settings = config(
        8, 2, training_steps=400, batch_size=64, lr_schedule="cosine", optimizer=OptimizerConfig(learning_rate=1e-2), checkpoint_every=400
    )
    link, student = a_link(settings, "sample")
    data = MixtureSet()
    rows = train(link, reader(data), len(data), settings, make_workspace(tmp_path), seed=1)
    assert rows[-1]["student.loss"] < 0.02 * rows[0]["student.loss"]
    # Two steps of the student end where eight steps of DDIM end.
    batch = LatentBatch(*data.samples(list(range(64))))
    noise = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(9))
    ends = []
    for denoiser, steps in ((student, 2), (link.teacher, 8), (link.teacher, 2)):
        x = noise
        for t, s in zip(trailing_timesteps(steps), (*trailing_timesteps(steps)[1:], CLEAN), strict=True):
            with torch.no_grad():
                x = ddim_moves(denoiser, x, [torch.full((64,), t), torch.full((64,), s)], batch.conditioning)
        ends.append(x)
    student_error = (ends[0] - ends[1]).square().mean()
    few_steps_error = (ends[2] - ends[1]).square().mean()
    assert student_error < 0.25 * few_steps_error


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_switch_teaches_x0(tmp_path: Path, kind: str) -> None:
    settings = config(2, 1, prediction="sample", training_steps=300, batch_size=64, optimizer=OptimizerConfig(learning_rate=1e-2))
    student = SmallStudent((999,), PREDICTION_TYPES["sample"])
    switch = SampleSwitch(settings, teacher=mixture(kind), student=in_training(student))
    data = MixtureSet()
    prepared = switch.prepare(LatentBatch(*data.samples(list(range(8)))), Draw(1, (0,), range(8), CPU))
    x_t, t = prepared.sample.x_t, prepared.sample.timesteps[0]
    torch.testing.assert_close(prepared.target, mixture().posterior_mean(x_t, t, prepared.sample.conditioning), rtol=1e-4, atol=1e-4)
    rows = train(switch, reader(data), len(data), settings, make_workspace(tmp_path), seed=1)
    assert rows[-1]["student.loss"] < 0.02 * rows[0]["student.loss"]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest[Teacher], Manifest[Latents]]:
    folder = tmp_path_factory.mktemp("sdxl")
    teacher = artifacts.make_teacher(folder, "sdxl")
    return folder, teacher, artifacts.make_latents(folder, teacher)


def run_link(
    place: tuple[Path, Manifest[Teacher], Manifest[Latents]],
    settings: LinkConfig,
    previous: StudentManifest | None = None,
) -> StudentManifest:
    folder, teacher, latents = place
    inputs = lightning.Inputs(teacher=teacher, latents=latents, source=previous, start=previous)
    return lightning.run(settings, inputs, artifacts.workspace(folder, config=settings))


def test_a_chain_of_loras_then_unets_down_to_one_step(sdxl: tuple[Path, Manifest[Teacher], Manifest[Latents]]) -> None:
    folder, teacher, _ = sdxl
    lora = {"network": "lora", "lora_rank": 4, "lora_alpha": 8}
    eight = run_link(sdxl, config(16, 8, guidance_scale=6.0, **lora))
    four = run_link(sdxl, config(8, 4, **lora), eight)
    two = run_link(sdxl, config(4, 2, gradient_checkpointing=True, ema_decay=0.9), four)
    faster = OptimizerConfig(learning_rate=4e-3)
    one = run_link(sdxl, config(2, 1, prediction="sample", conversion_steps=4, conversion_optimizer=faster), two)
    assert [student.content.kind for student in (eight, four, two, one)] == ["student_lora"] * 2 + ["student_unet"] * 2
    assert [student.content.prediction_type for student in (eight, four, two, one)] == ["epsilon"] * 3 + ["sample"]
    assert one.content.timesteps == {1: (999,)}
    assert four.content.timesteps == {4: (999, 749, 499, 249)}
    store = artifacts.open_store(folder)
    pipeline = TeacherPipeline.load(store.fetch(teacher))
    # A LoRA is relative to the base teacher: a plain diffusers call puts it there and gives the bits of the stage's own student.
    x = torch.randn(2, *pipeline.latent_shape, generator=torch.Generator().manual_seed(1))
    t, conditioning = torch.tensor([999, 249]), pipeline.conditioning(["the red cat", "dog"])
    before = pipeline.denoiser()(x, t, conditioning)
    ours = load_student(pipeline, four, store.fetch(four))(x, t, conditioning)
    assert torch.equal(pipeline.denoiser()(x, t, conditioning), before), "the teacher itself was changed"
    plain = pipeline.diffusers()
    plain.load_lora_weights(store.fetch(four))
    assert torch.equal(pipeline.denoiser()(x, t, conditioning), ours)
    merged = load_student(TeacherPipeline.load(store.fetch(teacher)), four, store.fetch(four), merged=True)(x, t, conditioning)
    torch.testing.assert_close(merged, ours, rtol=1e-4, atol=1e-5)
    assert not torch.equal(ours, before)
    unet = UNet2DConditionModel.from_pretrained(store.fetch(one), subfolder="unet")
    assert torch.equal(load_student(pipeline, one, store.fetch(one)).unet.conv_in.weight, unet.conv_in.weight)
    conversion = read_metrics(store.fetch(one) / "conversion.parquet")
    assert [row["student.learning_rate"] for row in conversion] == [4e-3] * 4
    assert [entry.path for entry in two.files if entry.path == "conversion.parquet"] == []
    for student in (two, one):
        assert str(folder) not in (store.fetch(student) / "unet" / "config.json").read_text()


@pytest.mark.slow
def test_killed_in_the_middle_it_ends_with_the_same_files(sdxl: tuple[Path, Manifest[Teacher], Manifest[Latents]], tmp_path: Path) -> None:
    settings = config(
        4, 2, guidance_scale=6.0, prediction="sample", conversion_steps=6, training_steps=20, checkpoint_every=5, ema_decay=0.9, accumulation_steps=2
    )  # fmt: skip
    folder, teacher, latents = sdxl
    whole = run_link(sdxl, settings)
    shutil.copytree(folder / "store", tmp_path / "store", ignore=shutil.ignore_patterns(f"{whole.identity}*"))
    again = killed_and_resumed(tmp_path, "lightning", settings, lightning.Inputs(teacher=teacher, latents=latents), "checkpoint-00000010")
    assert again.files == whole.files


def test_what_does_not_fit_is_refused(sdxl: tuple[Path, Manifest[Teacher], Manifest[Latents]]) -> None:
    folder, teacher, latents = sdxl
    unet = run_link(sdxl, config(8, 4, training_steps=1))
    with pytest.raises(BadInput, match="expected the same of the student it starts from"):
        run_link(sdxl, config(4, 2, network="lora"), unet)
    other = artifacts.make_teacher(folder, "sd15")
    with pytest.raises(BadInput, match=f"latents: made with the teacher {teacher.identity[:12]}; expected those of {other.identity[:12]}"):
        lightning.run(config(8, 4), lightning.Inputs(teacher=other, latents=latents), artifacts.workspace(folder, config=config(8, 4)))


def test_a_chain_that_puts_a_lora_on_a_unet_is_refused() -> None:
    with pytest.raises(ValidationError, match="a LoRA is published relative to the base teacher and cannot start from the UNet of 8 steps"):
        LightningConfig.model_validate({"chain": [16, 8, 4], "links": {4: {"network": "lora"}}})
    LightningConfig.model_validate({"chain": [16, 8, 4], "links": {8: {"network": "lora"}}})
