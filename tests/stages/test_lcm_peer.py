"""The loss and its gradients against the formulas of diffusers' scripts, through diffusers' own objects, on one batch with one noise."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from schemas.lcm import LcmConfig
from stages.diffusion.guidance import add_guidance_input
from stages.diffusion.lora import add_lora, lora_layers, without_lora
from stages.diffusion.pipeline import TeacherPipeline
from stages.lcm.distillation import ConsistencyDistillation, TargetNetwork
from stages.students import Student
from stages.training import Draw
from stages.training.latent_batches import LatentBatch
from tests import tiny_pipelines
from tests.stages.mixtures import CPU

from diffusers import DDPMScheduler, LatentConsistencyModelPipeline  # isort: skip - after what defines torchvision's operations

PROMPTS = ("the red cat", "dog", "a", "the car", "x", "cat cat")
STEPS, SIGMA_DATA, SCALING, HUBER_C = 50, 0.5, 10.0, 0.001


class Script:
    """What a training step of the scripts computes: eps- or v-prediction, LCM's guidance, a DDIM solver on 50 timesteps."""

    def __init__(self, teacher: TeacherPipeline) -> None:
        known = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
        self.scheduler = DDPMScheduler(**{name: teacher.scheduler_config[name] for name in known})
        self.abar = self.scheduler.alphas_cumprod
        self.says_v = teacher.scheduler_config.get("prediction_type") == "v_prediction"
        self.grid = (torch.arange(1, STEPS + 1) * (1000 // STEPS)).round().long() - 1
        self.before = torch.cat([self.abar[:1], self.abar[self.grid[:-1]]])  # where a step from each of the grid ends

    def x0(self, output: Tensor, t: Tensor, x: Tensor) -> Tensor:
        abar = self.abar[t].reshape(-1, 1, 1, 1)
        return abar.sqrt() * x - (1 - abar).sqrt() * output if self.says_v else (x - (1 - abar).sqrt() * output) / abar.sqrt()

    def eps(self, output: Tensor, t: Tensor, x: Tensor) -> Tensor:
        abar = self.abar[t].reshape(-1, 1, 1, 1)
        return abar.sqrt() * output + (1 - abar).sqrt() * x if self.says_v else output

    def f(self, output: Tensor, t: Tensor, x: Tensor) -> Tensor:
        s = (SCALING * t).reshape(-1, 1, 1, 1)
        return SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2) * x + s / (s**2 + SIGMA_DATA**2) ** 0.5 * self.x0(output, t, x)

    def solved(self, conditional: Tensor, unconditional: Tensor, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
        """z_hat_n: x0 and eps are each guided, as c + w (c - u)."""
        w, t, abar = w.reshape(-1, 1, 1, 1), self.grid[index], self.before[index].reshape(-1, 1, 1, 1)
        of_text, of_none = self.x0(conditional, t, x), self.x0(unconditional, t, x)
        eps, without = self.eps(conditional, t, x), self.eps(unconditional, t, x)
        eps = eps + w * (eps - without)
        return abar.sqrt() * (of_text + w * (of_text - of_none)) + (1 - abar).sqrt() * eps


def distance(value: Tensor, target: Tensor, kind: str) -> Tensor:
    if kind == "l2":
        return nn.functional.mse_loss(value, target)
    return torch.mean(torch.sqrt((value - target) ** 2 + HUBER_C**2) - HUBER_C)


def stir(network: Any, only: str) -> None:
    """Give the parameters of this name values that training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if only in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(("kind", "network"), [("sdxl", "lora"), ("sdxl", "unet"), ("sd15", "unet"), ("sd2-v", "lora"), ("sd2-v", "unet")])
@pytest.mark.parametrize("loss", ["l2", "huber"])
def test_the_loss_is_the_scripts(tmp_path: Path, kind: tiny_pipelines.Kind, network: str, loss: str) -> None:
    teacher = TeacherPipeline.load(tiny_pipelines.save(kind, tmp_path / "teacher"))
    config = LcmConfig.model_validate(
        {"network": network, "loss": loss, "guidance_w_range": (3, 15) if network == "unet" else None, "batch_size": len(PROMPTS)}
    )
    shared = network == "lora"
    networks = [teacher.denoiser()] if shared else [TeacherPipeline.load(tmp_path / "teacher").denoiser() for _ in range(3)]
    base, student, target = networks * 3 if shared else networks
    if shared:
        add_lora(student.unet, 4, 8, seed=1)
        stir(student.unet, ".lora_B.")
    else:
        for number, each in enumerate((student, target)):
            add_guidance_input(each.unet)
            stir(each.unet, ("", "weight")[number])
    layers = lora_layers(student.unet)
    conditioning, none = teacher.conditioning(PROMPTS), teacher.unconditional()
    latents = torch.randn(len(PROMPTS), *teacher.latent_shape, generator=torch.Generator().manual_seed(4))
    draw = Draw(8, (0,), range(len(PROMPTS)), CPU)

    of_target = {name: parameter.detach() for name, parameter in target.unet.named_parameters()}
    method = ConsistencyDistillation(
        config,
        teacher=base,
        student=Student.of_unet(student),
        target=None if shared else TargetNetwork(target, of_target),
        unconditional=none,
        as_teacher=lambda: without_lora(layers),
    )
    with torch.no_grad():
        prepared = method.prepare(LatentBatch(latents, conditioning), draw)
    ours = method.loss("student", prepared, draw)["loss"]
    assert isinstance(ours, Tensor)
    parameters = [parameter for parameter in student.unet.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(ours, parameters)

    script = Script(teacher)
    index = draw.integers("timestep", STEPS)
    w = torch.full((len(PROMPTS),), 7.5) if shared else draw.uniform("guidance", 3, 15)
    start = script.grid[index]
    end = (start - 1000 // STEPS).clamp(min=0)

    def ask(unet: Any, x: Tensor, t: Tensor, prompt_embeds: Tensor, pooled: Tensor | None) -> Tensor:
        told = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=256)
        more = {"timestep_cond": told} if unet.config.time_cond_proj_dim else {}
        added = {"text_embeds": pooled, "time_ids": conditioning.time_ids} if kind == "sdxl" else None
        output: Tensor = unet(x, t, encoder_hidden_states=prompt_embeds, added_cond_kwargs=added, **more).sample
        return output

    text = (conditioning.prompt_embeds, conditioning.pooled)
    nothing = tuple(None if each is None else each.expand(len(PROMPTS), *each.shape[1:]) for each in (none.prompt_embeds, none.pooled))
    assert kind != "sdxl" or not nothing[0].any(), "the SDXL scripts' unconditional is zero"  # type: ignore[union-attr]
    assert script.says_v == (kind == "sd2-v")
    noisy = script.scheduler.add_noise(latents, draw.normal("noise", latents.shape[1:]), start)
    value = script.f(ask(student.unet, noisy, start, *text), start, noisy)
    with torch.no_grad():
        with without_lora(layers):
            of_text, of_none = ask(base.unet, noisy, start, *text), ask(base.unet, noisy, start, *nothing)  # type: ignore[arg-type]
        moved = script.solved(of_text, of_none, noisy, w, index)
        wanted = script.f(ask(target.unet, moved, end, *text), end, moved)
    theirs = distance(value, wanted, loss)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for own, their in zip(gradients, torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(own, their, rtol=2e-3, atol=1e-5 * max(1.0, float(their.abs().max())))
