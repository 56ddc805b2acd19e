"""That `distill plan` foretells the memory of `dmd`: networks counted exactly, activations within what the other methods are held to."""

import pytest

from schemas.data import EncodeConfig
from schemas.dmd import DmdConfig
from stages.memory_estimate import TeacherShape
from tests.stages.matched import config
from tests.tiny_pipelines import build

FLOAT = 4


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
