"""Latent consistency distillation of a whole UNet: its moving target, guidance as an input, exact resume, plain diffusers calls."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from schemas.base import digest
from schemas.lcm import LcmConfig
from schemas.manifest import Latents, Manifest, Teacher
from schemas.training import OptimizerConfig
from stages import lcm
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.sampling import draw_noise, image_generator, make_scheduler, sample
from stages.lcm.distillation import ConsistencyDistillation, ConsistencyPair
from stages.students import load_student
from stages.training import Draw, train
from stages.training.latent_batches import LatentBatch, reader
from tests import tiny_pipelines
from tests.stages.consistent import SmallStudent, a_method, config
from tests.stages.mixtures import CPU, SHAPE, MixtureSet
from tests.training import artifacts
from tests.training.mortal import Killed, Mortal
from tests.training.toys import make_workspace

Place = tuple[Path, Manifest[Teacher], Manifest[Latents]]
FAST = OptimizerConfig(learning_rate=1e-2)


class Watched(ConsistencyDistillation):
    """Keeps the weights of student and target network that each step begins with."""

    seen: list[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]

    def prepare(self, batch: LatentBatch, draw: Draw) -> ConsistencyPair:
        self.seen.append((weights(self.student), weights(self.target)))
        return super().prepare(batch, draw)


def weights(network: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def test_the_target_network_is_the_moving_average_of_the_student_from_the_first_step_on(tmp_path: Path) -> None:
    settings = config(network="unet", target_decay=0.8, training_steps=4, accumulation_steps=2, optimizer=FAST)
    method, student, _ = a_method(settings, "epsilon")
    method.__class__, method.seen = Watched, []  # type: ignore[attr-defined]
    data = MixtureSet()
    train(method, reader(data), len(data), settings, make_workspace(tmp_path), seed=1)
    steps = method.seen[::2]  # type: ignore[attr-defined]  # both micro-batches of a step see the same weights
    assert len(steps) == 4
    average = steps[0][0]
    for own, target in steps:
        average = {name: 0.8 * value + 0.2 * own[name] if own is not steps[0][0] else value for name, value in average.items()}
        for name, value in average.items():
            torch.testing.assert_close(target[name], value)
    assert any(not torch.equal(steps[-1][0][name], value) for name, value in steps[-1][1].items()), "the average lags behind"
    target = weights(method.target)
    assert all(torch.equal(value, target[name]) for name, value in weights(student).items()), "what is published is the average"


def test_the_target_is_what_the_target_network_says() -> None:
    settings = config(network="unet", loss="l2")
    method, student, _ = a_method(settings, "v_prediction")
    batch, draw = LatentBatch(*MixtureSet().samples(list(range(16)))), Draw(5, (0,), range(16), CPU)
    target = copy.deepcopy(method.target)
    with torch.no_grad():
        first = method.prepare(batch, draw)
        for parameter in student.parameters():
            parameter.add_(0.1)
        assert torch.equal(method.prepare(batch, draw).target, first.target)
        for value in method.players["student"].average.values():  # type: ignore[union-attr]
            value.add_(0.1)
        moved = method.prepare(batch, draw)
    assert not torch.allclose(moved.target, first.target, atol=1e-3)
    assert isinstance(target, SmallStudent)


def test_every_sample_is_guided_by_the_w_that_the_student_is_told() -> None:
    batch, draw = LatentBatch(*MixtureSet().samples(list(range(12)))), Draw(5, (0,), range(12), CPU)
    prepared = a_method(config(network="unet", guidance_w_range=(2, 14)), "epsilon")[0].prepare(batch, draw)
    told = prepared.conditioning.guidance_w
    assert told is not None and told.shape == (12,) and 2 <= told.min() < 4 and 11 < told.max() < 14
    for row, w in enumerate(told.tolist()):
        method = a_method(config(network="unet", guidance_w=w), "epsilon")[0]
        alone = method.prepare(LatentBatch(batch.latents[row : row + 1], batch.conditioning[row]), replace(draw, positions=(row,)))
        assert alone.conditioning.guidance_w is None
        torch.testing.assert_close(prepared.target[row], alone.target[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(prepared.x_t[row], alone.x_t[0])
    assert prepared.x_t.shape[1:] == SHAPE


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"ema_decay": 0.9, "network": "unet"}, "expected its decay in target_decay"),
        ({"guidance_w_range": (2, 14)}, "a LoRA has no input for w"),
        ({"guidance_w_range": (14, 2), "network": "unet"}, "expected the lowest w before the highest"),
        (
            {"guidance_w_range": (2, 7), "network": "unet"},
            r"the student is not trained for it: expected a w in guidance_w_range = \[2.0, 7.0\]",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(more: dict[str, object], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        LcmConfig.model_validate(more)


def test_rates_are_those_of_the_network() -> None:
    rates = {network: LcmConfig.model_validate({"network": network}).optimizer.learning_rate for network in ("unet", "lora")}
    assert rates == {"unet": 8e-6, "lora": 1e-4}
    assert LcmConfig.model_validate(LcmConfig().model_dump(mode="json")) == LcmConfig()


def settings(**more: object) -> LcmConfig:
    known: dict[str, object] = {"network": "unet", "guidance_w_range": (2, 14), "training_steps": 3, "warmup_steps": 0, "steps": (4, 2)}
    return config(**known | {"optimizer": {"learning_rate": 1e-3}} | more)


def make_place(folder: Path, kind: tiny_pipelines.Kind) -> Place:
    teacher = artifacts.make_teacher(folder, kind)
    return folder, teacher, artifacts.make_latents(folder, teacher)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("sdxl", {"loss": "l2"}),
        ("sd15", {"loss": "huber", "gradient_checkpointing": True, "accumulation_steps": 2}),
        ("sd2-v", {"loss": "l2", "precision": "bfloat16"}),
        ("sd2-v", {"loss": "huber", "guidance_w_range": None}),
    ],
)
def test_a_plain_diffusers_call_gives_the_students_pictures_bit_for_bit(
    tmp_path: Path, kind: tiny_pipelines.Kind, more: dict[str, object]
) -> None:
    folder, teacher, latents = make_place(tmp_path, kind)
    run = settings(**more)
    made = lcm.run(run, lcm.Inputs(teacher=teacher, latents=latents), artifacts.workspace(folder, config=run))
    content = made.content
    assert content.kind == "student_unet" and content.prediction_type == teacher.content.prediction_type
    assert (content.guidance_scale, content.guidance_range) == ((8.5, (3, 15)) if run.guidance_w_range else (1, None))

    store = artifacts.open_store(folder)
    pipeline = TeacherPipeline.load(store.fetch(teacher))
    unet = diffusers.UNet2DConditionModel.from_pretrained(store.fetch(made) / "unet")
    plain = diffusers.DiffusionPipeline.from_pretrained(store.fetch(teacher), unet=unet)
    plain.scheduler = make_scheduler("lcm", pipeline.scheduler_config, content.prediction_type)
    plain.set_progress_bar_config(disable=True)
    prompts = ["the red cat", "dog"]

    def ours(scale: float) -> Tensor:
        generators = [image_generator(3, i) for i in range(2)]
        conditioning = pipeline.conditioning(prompts)
        return sample(
            load_student(pipeline, made, store.fetch(made)),
            draw_noise(generators, pipeline.latent_shape),
            conditioning.with_guidance(scale - 1) if content.guidance_range else conditioning,
            scheduler=make_scheduler("lcm", pipeline.scheduler_config, content.prediction_type),
            steps=2,
            generator=generators,
        )

    def theirs(scale: float) -> Tensor:
        generators = [image_generator(3, i) for i in range(2)]
        images: Tensor = plain(prompts, num_inference_steps=2, guidance_scale=scale, generator=generators, output_type="latent").images
        return images

    drawn = theirs(content.guidance_scale)
    assert torch.equal(ours(content.guidance_scale), drawn)
    if content.guidance_range:
        assert torch.equal(ours(4.0), theirs(4.0))
        assert not torch.equal(ours(4.0), drawn), "another w, another picture"


@pytest.mark.slow
def test_killed_at_any_write_it_ends_with_the_same_files(tmp_path: Path) -> None:
    folder, teacher, latents = make_place(tmp_path, "sdxl")
    run = settings(training_steps=4, checkpoint_every=1, target_decay=0.7)
    inputs = lcm.Inputs(teacher=teacher, latents=latents)
    whole = lcm.run(run, inputs, artifacts.workspace(folder, config=run))
    for lives in (1, 2, 4):
        workspace = replace(artifacts.workspace(folder, config=run), identity=digest(["killed", lives]))
        with pytest.raises(Killed):
            lcm.run(run, inputs, Mortal.of(workspace, lives))
        assert lcm.run(run, inputs, workspace).files == whole.files
