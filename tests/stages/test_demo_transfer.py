"""What the recipe of transfer names beside its own runs: it is there, fits the demo's teacher, and is what it is said to be."""

from pathlib import Path
from typing import Any

import torch

from infra.demo.controlnet import TEACHER, write_controlnet
from schemas.loading import load_recipe
from stages.diffusion.control import ControlledDenoiser, edges
from stages.diffusion.facts import inspect
from stages.diffusion.pipeline import TeacherPipeline
from stages.evaluate.transfer import check_controlnet, check_size, load_controlnet

RECIPE = TEACHER.parent / "tiny-transfer.yaml"


def entries() -> dict[str, Any]:
    evaluate = load_recipe(RECIPE, []).evaluate
    assert evaluate is not None
    return {entry.name: entry for entry in evaluate.transfer}


def test_the_recipe_has_an_entry_of_every_kind() -> None:
    named = entries()
    assert {name: entry.describe() for name, entry in named.items()} == {
        "night": "the base finetune-night",
        "night-guided": "the base finetune-night, students with guidance 2",
        "sepia": "the teacher with finetune-sepia at 0.8",
        "wide": "the teacher at 64 x 96 px",
        "sketch": "the teacher, from pictures at strength 0.6",
        "traced": "the teacher with a ControlNet at 1",
    }
    check_size(named["wide"].size_px, inspect(TEACHER), "size_px")


def test_the_demos_controlnet_fits_its_teacher_and_adds_nothing_yet(tmp_path: Path) -> None:
    folder = write_controlnet(tmp_path / "demo" / "controlnet")
    assert write_controlnet(folder) == folder, "what is there is used as it is"
    again = write_controlnet(tmp_path / "again")
    files = [{path.name: path.read_bytes() for path in place.iterdir()} for place in (folder, again)]
    assert files[0] == files[1] and set(files[0]) == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["controlnet"]
    check_controlnet(folder, TEACHER, "controlnet")

    pipeline = TeacherPipeline.load(TEACHER)
    controlnet = load_controlnet(folder, pipeline.dtype)
    for name, tensor in controlnet.state_dict().items():
        own = pipeline.unet.state_dict().get(name)
        assert own is None or torch.equal(own, tensor), name
    x, t = torch.randn(1, *pipeline.latent_shape), torch.tensor([499])
    side = pipeline.resolution
    controlled = ControlledDenoiser(pipeline.denoiser(), controlnet, edges(torch.rand(1, 3, side, side)), 1.0)
    with torch.no_grad():
        text = pipeline.conditioning(["red apple"])
        assert torch.equal(controlled(x, t, text), pipeline.denoiser()(x, t, text))
