"""LoRA: from a seed, on the published layers, through a file with alpha into a plain diffusers pipeline, merged without a trace."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from schemas.errors import BadInput
from stages.diffusion.lora import (
    LORA_FILE,
    LORA_TARGETS,
    add_lora,
    load_lora,
    load_lora_state,
    lora_state,
    merge_lora,
    remove_lora,
    save_lora,
)
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.sampling import image_generator
from tests import tiny_pipelines

RANK, ALPHA = 4, 6.5


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.save(request.param, tmp_path_factory.mktemp("pipelines") / request.param)


def output(teacher: TeacherPipeline, unet: Any = None) -> torch.Tensor:
    """The UNet's output at one fixed input."""
    denoiser = teacher.denoiser()
    denoiser.unet = unet or teacher.unet
    x = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return denoiser(x, torch.tensor([700, 20]), teacher.conditioning(["the red cat", "a dog"]))


def stir(unet: Any, seed: int = 1) -> None:
    """Give the adapter's B values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    load_lora_state(unet, {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in lora_state(unet).items()})


def test_the_published_layers_get_an_adapter_and_only_those(folder: Path) -> None:
    unet = TeacherPipeline.load(folder).unet
    layers = {name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)}
    parameters = add_lora(unet, RANK, ALPHA, seed=0)
    adapted = {name.partition(".lora_")[0] for name in lora_state(unet)}
    left_out = layers - adapted
    assert {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"} <= left_out
    assert left_out <= {
        "conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2", "add_embedding.linear_1", "add_embedding.linear_2",
    }  # fmt: skip
    for target in LORA_TARGETS:
        assert any(name.endswith(target) for name in adapted), target
    assert {id(parameter) for parameter in parameters} == {id(parameter) for parameter in unet.parameters() if parameter.requires_grad}
    assert len(parameters) == 2 * len(adapted)


def test_a_new_adapter_changes_nothing_and_comes_from_its_seed_alone(folder: Path) -> None:
    teacher = TeacherPipeline.load(folder)
    before, state = output(teacher), torch.random.get_rng_state()
    add_lora(teacher.unet, RANK, ALPHA, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.allclose(output(teacher), before, atol=1e-6)
    first = lora_state(teacher.unet)
    for seed, equal in ((5, True), (6, False)):
        torch.manual_seed(seed + 100)
        other = TeacherPipeline.load(folder).unet
        add_lora(other, RANK, ALPHA, seed=seed)
        assert all(torch.equal(value, first[name]) for name, value in lora_state(other).items()) is equal
    assert all(value.any() for name, value in first.items() if "lora_A" in name)
    assert not any(value.any() for name, value in first.items() if "lora_B" in name)
    with pytest.raises(BadInput, match="already"):
        add_lora(teacher.unet, RANK, ALPHA, seed=0)


def test_a_saved_adapter_gives_a_fresh_plain_pipeline_the_same_pictures(folder: Path, tmp_path: Path) -> None:
    teacher = TeacherPipeline.load(folder)
    base = output(teacher)
    add_lora(teacher.unet, RANK, ALPHA, seed=0)
    stir(teacher.unet)
    adapted = output(teacher)
    assert not torch.allclose(adapted, base, atol=1e-3)
    save_lora(teacher.unet, tmp_path)

    fresh = diffusers.DiffusionPipeline.from_pretrained(folder)
    fresh.set_progress_bar_config(disable=True)
    fresh.load_lora_weights(tmp_path)
    assert {(config.r, config.lora_alpha) for config in fresh.unet.peft_config.values()} == {(RANK, ALPHA)}
    assert torch.equal(output(teacher, fresh.unet), adapted)
    arguments: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    ours = teacher.diffusers()(["the red cat"], generator=[image_generator(0, 0)], **arguments).images
    assert torch.equal(fresh(["the red cat"], generator=[image_generator(0, 0)], **arguments).images, ours)

    again = TeacherPipeline.load(folder)
    load_lora(again.unet, tmp_path)
    assert torch.equal(output(again), adapted)


def test_equal_adapters_are_equal_files(folder: Path, tmp_path: Path) -> None:
    unets = [TeacherPipeline.load(folder).unet for _ in range(2)]
    for unet in unets:
        add_lora(unet, RANK, ALPHA, seed=0)
        stir(unet)
    files = {save_lora(unet, tmp_path / str(i)).read_bytes() for i in range(5) for unet in unets}
    assert len(files) == 1


def test_merging_keeps_the_function_and_leaves_no_trace(folder: Path, tmp_path: Path) -> None:
    teacher = TeacherPipeline.load(folder)
    names = list(teacher.unet.state_dict())
    add_lora(teacher.unet, RANK, ALPHA, seed=0)
    stir(teacher.unet)
    adapted = output(teacher)
    merge_lora(teacher.unet)
    assert list(teacher.unet.state_dict()) == names
    assert not any("base_layer" in name or "lora" in name for name, _ in teacher.unet.named_modules())
    assert torch.allclose(output(teacher), adapted, atol=1e-4)
    assert all(parameter.requires_grad for parameter in teacher.unet.parameters())
    merged = output(teacher)
    teacher.unet.save_pretrained(tmp_path)
    reloaded, info = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(output(teacher, reloaded.eval()), merged)
    add_lora(teacher.unet, RANK, ALPHA, seed=1)  # the next one of a chain fits


def test_removing_gives_the_base_back(folder: Path) -> None:
    teacher = TeacherPipeline.load(folder)
    before = output(teacher)
    add_lora(teacher.unet, RANK, ALPHA, seed=0)
    stir(teacher.unet)
    remove_lora(teacher.unet)
    assert torch.equal(output(teacher), before)


def test_an_adapter_that_learns_reaches_every_parameter(folder: Path) -> None:
    """B gets gradients at once, A after B has moved."""
    teacher = TeacherPipeline.load(folder)
    add_lora(teacher.unet, RANK, ALPHA, seed=0)
    stir(teacher.unet)
    x = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    teacher.denoiser()(x, torch.tensor([500]), teacher.conditioning(["the"])).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in teacher.unet.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())


def test_files_that_are_no_lora_of_ours_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    unet = TeacherPipeline.load(folder).unet
    with pytest.raises(BadInput, match="cannot be read"):
        load_lora(unet, tmp_path)
    (tmp_path / LORA_FILE).write_bytes(b"nothing")
    with pytest.raises(BadInput, match="cannot be read"):
        load_lora(unet, tmp_path)
    save_file({"unet.x": torch.zeros(1)}, tmp_path / LORA_FILE)
    with pytest.raises(BadInput, match="rank and alpha"):
        load_lora(unet, tmp_path)
    add_lora(unet, RANK, ALPHA, seed=0)
    with pytest.raises(BadInput, match="names differ"):
        load_lora_state(unet, {"x": torch.zeros(1)})
