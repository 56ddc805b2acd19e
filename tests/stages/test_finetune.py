"""`finetune`: the loss in closed form, what is trained on, a LoRA and a base that plain diffusers loads, the same after a stop."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infra.progress import NullProgress
from schemas.base import digest
from schemas.data import EncodeConfig
from schemas.errors import BadInput
from schemas.finetune import FinetuneConfig
from schemas.loading import parse_recipe
from schemas.manifest import FinetunedLoRA, Latents, Manifest, Teacher
from schemas.recipe import Recipe
from stages import finetune
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.exact import GaussianMixtureDenoiser
from stages.diffusion.lora import load_lora
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.prediction import PREDICTION_TYPES
from stages.diffusion.schedule import NoiseSchedule
from stages.finetune import Denoising
from stages.memory_estimate import TeacherShape
from stages.plan import make_plan
from stages.students import Student
from stages.training import Draw
from stages.training.latent_batches import LatentBatch
from stages.training.metrics import read_metrics
from tests import tiny_pipelines
from tests.stages.killed import Job, parts_of, run_until_it_dies
from tests.stages.killed import run as run_job
from tests.tiny_pipelines import DDIMScheduler
from tests.training import artifacts

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SCHEDULE = NoiseSchedule.from_scheduler_config(BETAS)
CPU = torch.device("cpu")
SHAPE, STD = (2, 2, 2), 0.3
MEANS = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(2))
NULL = Conditioning(torch.full((1, 1, 1), -1.0))
Place = tuple[Path, Manifest[Teacher], Manifest[Latents]]


def config(**more: object) -> FinetuneConfig:
    settings: dict[str, object] = {"training_steps": 4, "batch_size": 4, "lora_rank": 2, "lora_alpha": 3, "checkpoint_every": 2}
    return FinetuneConfig.model_validate(settings | more)


def exact(kind: str, **more: object) -> Denoising:
    """The method on the exact score of the data of `samples`."""
    teacher = GaussianMixtureDenoiser(MEANS, STD, schedule=SCHEDULE, prediction=PREDICTION_TYPES[kind], by_class=True)
    return Denoising(config(**more), Student(teacher, {}, {}), unconditional=NULL)


def samples(count: int) -> LatentBatch:
    generator = torch.Generator().manual_seed(3)
    components = torch.randint(3, (count,), generator=generator)
    latents = MEANS[components] + STD * torch.randn(count, *SHAPE, generator=generator)
    return LatentBatch(latents, Conditioning(components.float().reshape(-1, 1, 1)))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_exact_score_has_the_loss_that_its_posterior_variance_says(kind: str) -> None:
    """Var(x0 | x_t) = s^2 sigma^2 / (alpha^2 s^2 + sigma^2); weighted by min-SNR the loss is the same for every prediction type."""
    count = 4096
    method = exact(kind, batch_size=count, caption_dropout=0, snr_gamma=5)
    draw = Draw(5, (0,), range(count), CPU)
    prepared = method.prepare(samples(count), draw)
    figures = method.loss("student", prepared, draw)
    abar = SCHEDULE.alphas_cumprod.double()
    variance = STD**2 * (1 - abar) / (abar * STD**2 + 1 - abar)
    scale = {"epsilon": abar / (1 - abar), "v_prediction": 1 / (1 - abar), "sample": torch.ones_like(abar)}[kind]
    assert float(figures["mse"]) == pytest.approx(float((scale * variance).mean()), rel=0.03)  # type: ignore[arg-type]
    weighted = (abar / (1 - abar)).clamp(max=5) * variance
    assert float(figures["loss"]) == pytest.approx(float(weighted.mean()), rel=0.03)  # type: ignore[arg-type]
    assert float(prepared.timesteps.double().mean()) == pytest.approx(499.5, abs=0.5), "uniform, from strata"


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noise_and_target_are_diffusers(kind: str) -> None:
    method, batch, draw = exact(kind), samples(4), Draw(5, (0,), range(4), CPU)
    prepared = method.prepare(batch, draw)
    scheduler: Any = DDIMScheduler(**BETAS)
    eps = draw.normal("eps", SHAPE)
    torch.testing.assert_close(prepared.x_t, scheduler.add_noise(batch.latents, eps, prepared.timesteps))
    target = {"epsilon": eps, "v_prediction": scheduler.get_velocity(batch.latents, eps, prepared.timesteps), "sample": batch.latents}[kind]
    torch.testing.assert_close(prepared.target, target)
    assert prepared.weight.tolist() == [1, 1, 1, 1]


def test_captions_are_dropped_to_the_unconditional_embedding_and_keep_their_time_ids() -> None:
    count = 2000
    method = exact("epsilon", batch_size=count, caption_dropout=0.25)
    time_ids = torch.arange(6.0) + torch.arange(count)[:, None]
    text = Conditioning(torch.ones(count, 3, 2), torch.ones(count, 5), time_ids)
    method.unconditional = Conditioning(torch.zeros(1, 3, 2), torch.full((1, 5), 7.0))
    latents = torch.zeros(count, *SHAPE)
    prepared = method.prepare(LatentBatch(latents, text), Draw(5, (0,), range(count), CPU)).conditioning
    dropped = prepared.prompt_embeds[:, 0, 0] == 0
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert prepared.pooled is not None
    assert torch.equal(prepared.prompt_embeds, (~dropped).float()[:, None, None].expand(count, 3, 2))
    assert torch.equal(prepared.pooled, torch.where(dropped, 7.0, 1.0)[:, None].expand(count, 5))
    assert prepared.time_ids is not None and torch.equal(prepared.time_ids, time_ids)


@pytest.fixture(scope="module", params=["sd2-v", "sdxl"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp(request.param)
    teacher = artifacts.make_teacher(folder, request.param)
    return folder, teacher, artifacts.make_latents(folder, teacher)


def run(place: Place, settings: FinetuneConfig) -> Manifest[Any]:
    folder, teacher, latents = place
    return finetune.run(settings, finetune.Inputs(teacher=teacher, latents=latents), artifacts.workspace(folder, config=settings))


def output(pipeline: TeacherPipeline, unet: Any) -> torch.Tensor:
    denoiser = pipeline.denoiser()
    denoiser.unet = unet
    x = torch.randn(2, *pipeline.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return denoiser(x, torch.tensor([700, 20]), pipeline.conditioning(["the red cat", "a dog"]))


def test_a_style_lora_of_some_captions_loads_in_a_plain_pipeline(place: Place) -> None:
    folder, teacher, _ = place
    style = run(place, config(captions=r"\bCAT\b", ema_decay=0.9))
    assert style.content == FinetunedLoRA(rank=2, alpha=3, samples=4, training_steps=4, teacher=teacher.identity)
    store = artifacts.open_store(folder)
    pipeline = TeacherPipeline.load(store.fetch(teacher))
    base = output(pipeline, pipeline.unet)
    load_lora(pipeline.unet, store.fetch(style))
    ours = output(pipeline, pipeline.unet)
    assert not torch.equal(ours, base)
    plain: Any = diffusers.DiffusionPipeline.from_pretrained(store.fetch(teacher))
    plain.load_lora_weights(store.fetch(style))
    assert {(known.r, known.lora_alpha) for known in plain.unet.peft_config.values()} == {(2, 3)}
    assert torch.equal(output(pipeline, plain.unet), ours)


def test_a_base_is_a_complete_teacher_and_a_run_gone_on_with_ends_with_the_same_bytes(place: Place) -> None:
    folder, teacher, latents = place
    settings = config(network="unet", ema_decay=0.9, snr_gamma=5, training_steps=5, gradient_checkpointing=True)
    base = run(place, settings)
    store = artifacts.open_store(folder)
    found, source = store.fetch(base), store.fetch(teacher)
    assert base.content.architecture == teacher.content.architecture
    assert base.content.prediction_type == teacher.content.prediction_type
    assert base.content.weights_digest != teacher.content.weights_digest
    entries = {entry.path: entry.sha256 for entry in teacher.files if not entry.path.startswith("unet/")}
    assert entries.items() <= {entry.path: entry.sha256 for entry in base.files}.items(), "all but the UNet is the teacher's"
    before, after = (load_file(place / "unet/diffusion_pytorch_model.safetensors") for place in (source, found))
    assert before.keys() == after.keys()
    assert all(tensor.dtype == torch.float32 and not torch.equal(tensor, before[name]) for name, tensor in after.items())
    pipeline, plain = TeacherPipeline.load(found), diffusers.DiffusionPipeline.from_pretrained(found)
    assert torch.equal(output(pipeline, plain.unet), output(pipeline, pipeline.unet))

    class Stop(NullProgress):
        def update(self, done: int, *_: Any, **__: Any) -> None:
            if done == 3:
                raise KeyboardInterrupt

    inputs = finetune.Inputs(teacher=teacher, latents=latents)
    again = replace(artifacts.workspace(folder, config=settings), identity=digest("again"))
    with pytest.raises(KeyboardInterrupt):
        finetune.run(settings, inputs, replace(again, progress=Stop()))
    assert [part.name for part in again.parts()] == ["checkpoint-00000002", "checkpoint-00000003"]
    again.delete_parts(["checkpoint-00000003"])  # which a killed process would not have written
    assert finetune.run(settings, inputs, again).files == base.files


@pytest.mark.slow
def test_after_a_sigkill_it_ends_with_the_same_bytes(place: Place) -> None:
    folder, teacher, latents = place
    settings = config(ema_decay=0.8)
    inputs = {"teacher": teacher.identity, "latents": latents.identity}
    job = Job(
        stage="finetune", config=settings.model_dump(mode="json"), inputs=inputs, folder=str(folder), identity="killed", seed=3,
        die_after_parts=1,
    )  # fmt: skip
    run_until_it_dies(job)
    assert parts_of(job) == ["checkpoint-00000002"]
    assert run_job(job.model_copy(update={"die_after_parts": None})).files == run(place, settings).files


def test_its_figures_are_reported_as_a_students_are(place: Place) -> None:
    store = artifacts.open_store(place[0])
    for made, heading, says in (
        (
            run(place, config(captions=r"\bCAT\b", ema_decay=0.9)),
            "A style",
            "LoRA of rank 2, of 4 pictures · 4 optimiser steps of 4 samples",
        ),
        (run(place, config(network="unet")), "Another base", "whole UNet, says "),
    ):
        folder = store.fetch(made)
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert f"<h1>{heading}</h1>" in page and says in page
        for title in ("Loss of the student", "Standard deviation", "Norm of the gradients", "Learning rate"):
            assert title in page
        assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
        read = EventAccumulator(str(folder / "tensorboard")).Reload()
        losses = [row["student.loss"] for row in read_metrics(folder / "metrics.parquet")]
        assert [event.value for event in read.Scalars("student/loss")] == pytest.approx(losses)


def test_a_pattern_without_captions_and_another_teachers_latents_are_refused(place: Place) -> None:
    with pytest.raises(BadInput, match=r"captions 'zebra': found in none of the 13 encoded captions"):
        run(place, config(captions="zebra"))
    folder, teacher, latents = place
    other = latents.model_copy(update={"content": latents.content.model_copy(update={"teacher": "0" * 64})})
    with pytest.raises(BadInput, match="latents: made with the teacher 000000000000"):
        run((folder, teacher, other), config())


def recipe(**more: object) -> dict[str, object]:
    return {"name": "x", "ingest": {"table": "t.csv"}, "teacher": {"source": "s"}, "lcm": {}} | more


def test_each_entry_is_a_run_of_its_own_after_encode() -> None:
    def planned(**more: object) -> dict[str, str]:
        return dict(make_plan(Recipe.model_validate(recipe(**more)), digest).identities)

    without = planned()
    both = planned(finetune={"style": {"captions": "emoji"}, "base-b": {"network": "unet"}})
    assert list(both) == ["ingest", "measure", "select", "teacher", "encode", "finetune-style", "finetune-base-b", "lcm"]
    assert without.items() <= both.items(), "nothing else is done again"
    other = planned(finetune={"style": {"captions": "emoji", "checkpoint_every": 7}, "base-b": {"network": "unet", "seed": 1}})
    assert {name for name in both if both[name] != other[name]} == {"finetune-base-b"}


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"a": {"captions": "(cat"}}, r"finetune.a.captions: found '\(cat'; expected a regular expression \(missing \)"),
        ({"A b": {}}, r"finetune.A b.*'A b'; expected: string should match pattern"),
        ({"a": {"warmup_steps": 9, "training_steps": 9}}, r"finetune.a.warmup_steps: found 9; .* fewer than finetune.a.training_steps = 9"),
        (
            {"a": {}, "b": {"accumulation_steps": 3}},
            r"finetune.b.accumulation_steps: found 3; expected a divisor of finetune.b.batch_size = 8",
        ),
        ({"a": {"world_size": 3}}, r"finetune.a.world_size: found 3; times finetune.a.accumulation_steps = 1: expected a divisor"),
        ({"a": {"lora_rnak": 3}}, r"finetune.a.lora_rnak: found 3; expected no such field here"),
    ],
)
def test_each_mistake_names_its_place(entries: dict[str, object], expected: str) -> None:
    with pytest.raises(BadInput, match=expected):
        parse_recipe(recipe(finetune=entries))


def test_the_memory_estimate_has_a_student_and_no_teacher(tmp_path: Path) -> None:
    shape = TeacherShape.read(tiny_pipelines.save("sdxl", tmp_path), EncodeConfig())
    pipeline = TeacherPipeline.load(tmp_path)
    weights = 4 * sum(parameter.numel() for parameter in pipeline.unet.parameters())
    whole = shape.estimate(config(network="unet", ema_decay=0.9)).parts
    assert (whole["teacher"], whole["student"], whole["optimizer"], whole["average"]) == (0, weights, 2 * weights, weights)
    assert whole["gradients"] == weights and whole["activations"] > 0
    lora = shape.estimate(config()).parts
    assert lora["teacher"] == 0 and weights < lora["student"] < 2 * weights
    assert lora["optimizer"] == 2 * (lora["student"] - weights)
