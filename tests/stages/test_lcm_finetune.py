"""Latent consistency fine-tuning: from a student that lies outside the store, with the known noise in the place of a teacher's solver."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from schemas.errors import BadInput
from schemas.lcm import LcmConfig
from schemas.loading import read_recipe
from schemas.manifest import Latents, Manifest, Teacher
from schemas.recipe import Recipe
from stages import lcm
from stages.lcm.distillation import ConsistencyDistillation
from stages.plan import make_plan
from stages.students import Student
from stages.training import Draw
from stages.training.latent_batches import LatentBatch
from tests.stages.consistent import NULL, a_method, config
from tests.stages.mixtures import CPU, SCHEDULE, SHAPE, MixtureSet
from tests.training import artifacts

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = {"lora": "pytorch_lora_weights.safetensors", "unet": "unet/diffusion_pytorch_model.safetensors"}


def test_with_known_noise_both_points_have_the_same() -> None:
    """f(z_{n+k}, t_{n+k}) and f(z_n, t_n) on one sample and one noise, and no teacher is asked."""
    settings = config(solver="known_noise", loss="l2")
    _, student, _ = a_method(settings, "epsilon")
    own = Student(student, dict(student.named_parameters()), student.state_dict())
    method = ConsistencyDistillation(settings, teacher=None, student=own, unconditional=NULL)
    latents, conditioning = MixtureSet().samples(list(range(64)))
    draw = Draw(5, (0,), range(64), CPU)
    with torch.no_grad():
        prepared = method.prepare(LatentBatch(latents, conditioning), draw)
        index, eps = draw.integers("timestep", 50), draw.normal("noise", SHAPE)
        ends = ((20 * index + 19), (20 * index - 1).clamp(min=0))
        values = []
        for t in ends:
            abar = SCHEDULE.alphas_cumprod[t].float().reshape(-1, 1, 1, 1)
            z = abar.sqrt() * latents + (1 - abar).sqrt() * eps
            x0 = (z - (1 - abar).sqrt() * student(z, t, conditioning)) / abar.sqrt()
            s = 10.0 * t.reshape(-1, 1, 1, 1)
            values.append(0.25 / (s**2 + 0.25) * z + s / (s**2 + 0.25) ** 0.5 * x0)
    torch.testing.assert_close(prepared.target, values[1], rtol=1e-4, atol=1e-5)
    loss = method.loss("student", prepared, draw)["loss"]
    torch.testing.assert_close(loss, (values[0] - values[1]).square().mean(), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest[Teacher], Manifest[Latents]]:
    folder = tmp_path_factory.mktemp("sdxl")
    teacher = artifacts.make_teacher(folder, "sdxl")
    return folder, teacher, artifacts.make_latents(folder, teacher)


def run(place: tuple[Path, Manifest[Teacher], Manifest[Latents]], settings: LcmConfig, outside: Mapping[str, str]) -> Path:
    """The folder of what a run publishes."""
    folder, teacher, latents = place
    workspace = replace(artifacts.workspace(folder, config=settings), outside=outside)
    return artifacts.open_store(folder).fetch(lcm.run(settings, lcm.Inputs(teacher=teacher, latents=latents), workspace))


@pytest.mark.slow
@pytest.mark.parametrize("network", ["lora", "unet"])
def test_a_student_is_gone_on_with_without_its_teacher(place: Any, network: str) -> None:
    told: dict[str, object] = {"network": network, "guidance_w_range": (2, 14) if network == "unet" else None, "training_steps": 3}
    first = run(place, config(**told, optimizer={"learning_rate": 1e-2}), {})
    outside = {"start": str(first)}
    slow: dict[str, object] = {"optimizer": {"name": "adam", "learning_rate": 1e-6}, "start": str(first)}
    for solver in ("known_noise", "ddim"):
        settings = config(**told, solver=solver, **slow)
        lcm.preflight(settings, outside, Recipe.model_construct())
        before, after = (load_file(folder / WEIGHTS[network]) for folder in (first, run(place, settings, outside)))
        assert before.keys() == after.keys()
        assert any(not torch.equal(after[name], value) for name, value in before.items()), "it was trained"
        for name, value in before.items():
            torch.testing.assert_close(after[name], value, rtol=0, atol=1e-5)


def test_its_content_is_part_of_the_identity_and_its_place_is_not() -> None:
    recipe = read_recipe((ROOT / "recipes" / "tiny.yaml").read_text(), ["lcm.solver=known_noise"])

    def identity(start: str | None, content: str) -> str:
        assert recipe.lcm is not None
        changed = recipe.model_copy(update={"lcm": recipe.lcm.model_copy(update={"start": start})})
        plan = make_plan(changed, lambda address: content if address == start else "0" * 64)
        assert ("start" in plan.node("lcm").outside) == (start is not None)
        return plan.identities["lcm"]

    assert identity("here", "1" * 64) == identity("there", "1" * 64)
    assert len({identity(None, ""), identity("here", "1" * 64), identity("here", "2" * 64)}) == 3


@pytest.mark.parametrize("network", ["lora", "unet"])
def test_what_cannot_be_gone_on_from_is_told_before_any_work(tmp_path: Path, network: str) -> None:
    settings = config(network=network, start=str(tmp_path))
    outside = {"start": str(tmp_path)}
    with pytest.raises(BadInput, match=r"lcm.start: .*expected a (LoRA|pipeline folder) in diffusers layout"):
        lcm.preflight(settings, outside, Recipe.model_construct())
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"time_cond_proj_dim": 256}))
    if network == "unet":
        with pytest.raises(BadInput, match=r"its UNet takes w as an input; expected lcm.guidance_w_range too"):
            lcm.preflight(settings, outside, Recipe.model_construct())
        lcm.preflight(config(network=network, guidance_w_range=(2, 14)), outside, Recipe.model_construct())


@pytest.mark.slow
def test_a_student_that_does_not_fit_is_refused(place: Any) -> None:
    first = run(place, config(training_steps=3), {})
    with pytest.raises(BadInput, match=r"lcm.start: .*a LoRA of rank 4 and alpha 8; expected lora_rank 2 and lora_alpha 8"):
        run(place, config(training_steps=3, lora_rank=2), {"start": str(first)})
    whole = run(place, config(training_steps=3, network="unet"), {})
    settings = json.loads((whole / "unet" / "config.json").read_text())
    other = place[0] / "other"
    (other / "unet").mkdir(parents=True)
    (other / "unet" / "config.json").write_text(json.dumps(settings | {"cross_attention_dim": 7}))
    with pytest.raises(BadInput, match=r"lcm.start: its UNet has cross_attention_dim 7; expected the teacher's, 40"):
        run(place, config(training_steps=3, network="unet"), {"start": str(other)})
