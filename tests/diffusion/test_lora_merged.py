"""A LoRA trained with its change in the weights: the values and gradients of peft's branch, where that is cheaper and nowhere else."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from schemas.training import OptimizerConfig
from stages.diffusion import lora_merged
from stages.diffusion.lora import (
    ADAPTER,
    add_lora,
    load_lora,
    load_lora_state,
    lora_layers,
    lora_parameters,
    lora_state,
    save_lora,
    without_lora,
)
from stages.diffusion.lora_merged import keep_no_sums, merge_in_training, merging_is_cheaper
from stages.diffusion.pipeline import TeacherPipeline
from stages.training import Player
from stages.training.optimization import Updater
from tests import tiny_pipelines

Pass = tuple[Tensor, list[Tensor]]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TeacherPipeline:
    teacher = TeacherPipeline.load(tiny_pipelines.save("sdxl", tmp_path_factory.mktemp("pipelines") / "sdxl"))
    add_lora(teacher.unet, 4, 6.5, seed=0)
    generator = torch.Generator().manual_seed(1)
    state = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in lora_state(teacher.unet).items()}
    load_lora_state(teacher.unet, state)
    return teacher


def passed(teacher: TeacherPipeline, unet: Any) -> Pass:
    """Output, and gradients of the adapter."""
    denoiser = teacher.denoiser()
    denoiser.unet = unet
    x, target = torch.randn(2, 2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    output = denoiser(x, torch.tensor([700, 20]), teacher.conditioning(["the red cat", "a dog"]))
    return output.detach(), list(torch.autograd.grad(mse_loss(output.float(), target), lora_parameters(unet)))


def trained(teacher: TeacherPipeline, *, channels_last: bool = True) -> Any:
    unet = copy.deepcopy(teacher.unet).train()
    return unet.to(memory_format=torch.channels_last) if channels_last else unet


@pytest.mark.parametrize(
    ("channels_last", "through_sum", "checkpointed"), [(True, True, False), (True, False, True), (False, True, True), (False, False, False)]
)
def test_values_and_gradients_are_the_branchs(
    teacher: TeacherPipeline, monkeypatch: pytest.MonkeyPatch, *, channels_last: bool, through_sum: bool, checkpointed: bool
) -> None:
    wanted, gradients = passed(teacher, trained(teacher, channels_last=channels_last))
    unet = trained(teacher, channels_last=channels_last)
    if checkpointed:
        unet.enable_gradient_checkpointing()
    merge_in_training(unet)
    counted = 0

    def always(*_arguments: object, **_more: object) -> bool:
        nonlocal counted
        counted += 1
        return True

    monkeypatch.setattr(lora_merged, "merging_is_cheaper", always)
    monkeypatch.setattr(lora_merged, "_sum_is_shorter", lambda *_tensors: through_sum)
    output, own = passed(teacher, unet)
    assert counted >= len(lora_layers(unet)), "every layer goes this way"
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(own, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_the_cheaper_way_is_taken_where_it_is_and_differs_by_rounding_only(teacher: TeacherPipeline) -> None:
    wanted, gradients = passed(teacher, trained(teacher))
    unet = trained(teacher)
    merge_in_training(unet)
    output, own = passed(teacher, unet)
    assert not torch.equal(output, wanted), "some layer goes the other way"
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(own, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_evaluation_low_precision_and_the_bare_network_are_pefts(teacher: TeacherPipeline) -> None:
    plain, unet = trained(teacher), trained(teacher)
    merge_in_training(unet)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(passed(teacher, unet)[0], passed(teacher, plain)[0])
    with torch.no_grad():
        outputs = []
        for each in (unet, plain):
            denoiser = teacher.denoiser()
            denoiser.unet = each
            x = torch.ones(1, *teacher.latent_shape)
            asked = (x, torch.tensor([500]), teacher.conditioning(["a dog"]))
            with without_lora(lora_layers(each)):
                outputs.append(denoiser(*asked))
            each.eval()
            outputs.append(denoiser(*asked))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])


@pytest.mark.parametrize("keeps", [True, False])
def test_sums_serve_until_the_backward_pass_and_follow_the_weights(teacher: TeacherPipeline, *, keeps: bool) -> None:
    """A target without gradients, a student's pass and an update, as a consistency distillation's steps go; the last update goes past the tensors'
    versions, as those of ZeRO do, and weights are set between passes, as a roll-back does."""
    plain, unet = trained(teacher), trained(teacher)
    merge_in_training(unet)
    if not keeps:
        keep_no_sums(unet)
    for step in range(3):
        results = []
        for each in (plain, unet):
            with torch.no_grad():
                denoiser = teacher.denoiser()
                denoiser.unet = each
                x, conditioning = torch.ones(1, *teacher.latent_shape), teacher.conditioning(["a dog"])
                target = denoiser(x, torch.tensor([500]), conditioning)
            assert bool(lora_merged._SUMS) is (keeps and each is unet)
            if step == 1:
                with torch.no_grad():
                    for parameter in lora_parameters(each):
                        parameter.mul_(1.5)
            output, gradients = passed(teacher, each)
            assert not lora_merged._SUMS
            for parameter, gradient in zip(lora_parameters(each), gradients, strict=True):
                parameter.data -= 10 * gradient
            results.append((target, output))
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_a_sum_without_a_backward_pass_does_not_outlive_an_update(teacher: TeacherPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made for a target without gradients, of layers that go the other way in the student's own pass, so that no backward pass lets it go. Fused Adam
    does not count up the versions of the weights that it changes."""
    monkeypatch.setattr(lora_merged, "merging_is_cheaper", lambda *_arguments, gradients: not gradients)
    unet = trained(teacher)
    merge_in_training(unet)
    parameters = dict(enumerate(lora_parameters(unet)))
    updater = Updater(Player({str(name): p for name, p in parameters.items()}, OptimizerConfig(learning_rate=0.1), 3))
    x, text = torch.ones(1, *teacher.latent_shape), teacher.conditioning(["a dog"])
    targets = []
    for _ in range(2):
        with torch.no_grad():
            denoiser = teacher.denoiser()
            denoiser.unet = unet
            targets.append(denoiser(x, torch.tensor([500]), text))
        assert lora_merged._SUMS, "kept"
        for parameter, gradient in zip(parameters.values(), passed(teacher, unet)[1], strict=True):
            parameter.grad = gradient
        updater.update(updater.grad_norm())
    plain = copy.deepcopy(unet).eval()  # peft's own way
    with torch.no_grad():
        denoiser = teacher.denoiser()
        for each in (unet, plain):
            denoiser.unet = each
            targets.append(denoiser(x, torch.tensor([500]), text))
    assert not torch.allclose(targets[0], targets[1], atol=1e-3) and not torch.allclose(targets[1], targets[2], atol=1e-3)
    torch.testing.assert_close(targets[2], targets[3], rtol=1e-4, atol=1e-4)


def test_a_copy_has_its_own_layers(teacher: TeacherPipeline) -> None:
    unet = trained(teacher)
    merge_in_training(unet)
    before = passed(teacher, unet)[0]
    other = copy.deepcopy(unet)
    with torch.no_grad():
        for layer in lora_layers(other):
            layer.lora_B[ADAPTER].weight.zero_()
    assert torch.equal(passed(teacher, unet)[0], before)
    assert not torch.allclose(passed(teacher, other)[0], before, atol=1e-4)


def test_the_sum_is_made_where_it_is_less_work_than_the_branch() -> None:
    """Rank 64 on layers of the tiny teacher and of SDXL, in passes of many rows, of a few, and of one for each sample."""
    small, large = nn.Linear(128, 128, device="meta"), nn.Linear(1280, 1280, device="meta")
    convolution = nn.Conv2d(1280, 1280, 3, padding=1, stride=2, device="meta")
    for layer, shape, with_gradients, without in (
        (small, (16, 64, 128), True, True),
        (small, (6, 16, 128), False, True),  # 96 rows: one sum is 64 x 128 x 128, and the branch 96 x 64 x 256
        (small, (16, 128), False, False),
        (large, (4, 1024, 1280), True, True),
        (convolution, (4, 1280, 64, 64), True, True),
        (convolution, (4, 1280, 45, 45), False, True),
        (convolution, (4, 1280, 16, 16), False, False),
    ):
        x = torch.empty(shape, device="meta")
        found = [merging_is_cheaper(x, layer, 64, gradients=gradients) for gradients in (True, False)]
        assert found == [with_gradients, without], (layer, shape)


def test_what_is_trained_is_in_the_file(teacher: TeacherPipeline, tmp_path: Path) -> None:
    unet = trained(teacher)
    merge_in_training(unet)
    save_lora(unet, tmp_path)
    fresh = copy.deepcopy(teacher.unet)
    fresh.unload_lora()
    load_lora(fresh, tmp_path)
    torch.testing.assert_close(passed(teacher, unet)[0], passed(teacher, fresh.eval())[0], rtol=1e-5, atol=1e-5)
