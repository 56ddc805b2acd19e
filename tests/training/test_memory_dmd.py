"""That `distill plan` foretells the memory of `dmd`: networks counted exactly, the peak within what the other methods are held to."""

from pathlib import Path

import pytest

from schemas.data import EncodeConfig
from schemas.dmd import DmdConfig
from stages import dmd
from stages.memory_estimate import TeacherShape
from tests.stages.matched import config, make_pairs
from tests.tiny_pipelines import build
from tests.training import artifacts
from tests.training.test_memory import ROOT, measured_peak

FLOAT = 4
LITE = {"regression": {"distance": "lpips-efficientnet-lite0"}}


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> tuple[TeacherShape, int]:
    folder = tmp_path_factory.mktemp("memory")
    pipeline = build("sdxl")
    pipeline.save_pretrained(folder, safe_serialization=True)
    return TeacherShape.read(folder, EncodeConfig()), FLOAT * sum(parameter.numel() for parameter in pipeline.unet.parameters())


def test_networks_are_counted(shape: tuple[TeacherShape, int]) -> None:
    teacher, unet = shape
    whole = teacher.estimate(config(batch_size=2)).parts
    assert (whole["teacher"], whole["student"], whole["fake_score"]) == (unet, unet, unet)
    assert whole["optimizer"] == 4 * unet and whole["discriminator"] == 0
    low = teacher.estimate(config(batch_size=2, teacher_precision="bfloat16", gan={})).parts
    assert low["teacher"] == unet // 2 and low["fake_score"] > unet, "the head on it"
    lora = teacher.estimate(config(batch_size=2, network="lora", lora_rank=2)).parts
    assert lora["teacher"] == 0 and unet < lora["student"] < 1.5 * unet
    shared = teacher.estimate(config(batch_size=2, network="lora", lora_rank=2, fake_network="lora", gan={})).parts
    adapter = lora["student"] - unet
    assert shared["teacher"] == 0 and shared["student"] == lora["student"] and shared["fake_score"] == adapter + low["fake_score"] - unet
    assert shared["optimizer"] == 2 * (adapter + shared["fake_score"]), "two moments of what is trained, and of nothing else"
    beside = teacher.estimate(config(batch_size=2, fake_network="lora", lora_rank=2)).parts
    assert (beside["teacher"], beside["student"], beside["fake_score"]) == (unet, unet, adapter)
    divided = teacher.estimate(config(batch_size=2, world_size=2, sharding="full")).parts
    assert divided["fake_score"] == unet // 2 and divided["gathered"] > 0
    assert divided["gradients"] == unet // 2
    accumulated = teacher.estimate(config(batch_size=4, accumulation_steps=2, world_size=2, sharding="full")).parts
    assert accumulated["gradients"] == unet, "whole until the last part of a batch"
    assert accumulated["fake_score"] == unet // 2


def test_more_outputs_and_a_gan_take_more(shape: tuple[TeacherShape, int]) -> None:
    teacher, _ = shape

    def activations(**more: object) -> int:
        settings: DmdConfig = config(batch_size=8, **more)
        return teacher.estimate(settings).parts["activations"]

    plain, paired, judged = activations(regression=None), activations(), activations(regression=None, gan={})
    assert 1.5 * plain < paired < 2.5 * plain
    assert judged > plain


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {**LITE, "gan": {}, "fake_updates": 2},
        {**LITE, "gradient_checkpointing": True},
        {"network": "lora", "fake_network": "lora", "lora_rank": 16, "gan": {}, "regression": None},
    ],
)
def test_the_estimate_is_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, object]) -> None:
    source = ROOT / "recipes" / "tiny_teacher"
    teacher = artifacts.make_teacher(tmp_path, source)
    latents = artifacts.make_latents(tmp_path, teacher)
    inputs = dmd.Inputs(teacher=teacher, latents=latents, pairs=make_pairs(tmp_path, teacher, latents))
    settings = config(batch_size=8, training_steps=2, checkpoint_every=100, **more)
    estimate = TeacherShape.read(source, EncodeConfig()).estimate(settings)
    workspace = artifacts.workspace(tmp_path, config=settings)
    measured = measured_peak("dmd", lambda: dmd.run(settings, inputs, workspace), monkeypatch)
    assert estimate.peak == pytest.approx(measured, rel=0.15), (measured, estimate)


def test_what_pictures_are_compared_with_is_counted(shape: tuple[TeacherShape, int]) -> None:
    teacher, _ = shape
    latents, vgg = (teacher.estimate(config(batch_size=2, regression={"distance": name})).parts for name in ("l2", "lpips"))
    tiny = teacher.estimate(config(batch_size=2, regression={"distance": "lpips", "decoder": "not-here"})).parts
    assert latents["distance"] == 0
    assert vgg["distance"] > FLOAT * 14_714_688, "VGG-16's convolutions, and the VAE"
    assert tiny["distance"] != vgg["distance"] and tiny["activations"] != vgg["activations"]
    recomputed = teacher.estimate(config(batch_size=2, regression={"distance": "lpips"}, gradient_checkpointing=True)).parts
    assert recomputed["activations"] < vgg["activations"]
