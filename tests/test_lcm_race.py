"""What `benchmarks.lcm_race` does around diffusers' script, which is not part of this repository."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from benchmarks import lcm_race_peer as peer
from schemas.errors import BadInput
from stages.diffusion.lora import load_lora, lora_config
from stages.diffusion.pipeline import TeacherPipeline
from tests import tiny_pipelines

from diffusers import StableDiffusionXLPipeline  # isort: skip - after what defines torchvision's operations
from diffusers.utils import convert_state_dict_to_diffusers  # isort: skip
from peft.utils import get_peft_model_state_dict  # isort: skip


@given(steps=st.integers(0, 40), batch=st.integers(1, 9), pictures=st.integers(1, 25))
def test_samples_are_those_of_a_loader_whose_last_batch_is_the_rest(steps: int, batch: int, pictures: int) -> None:
    loader: DataLoader[int] = DataLoader(range(pictures), batch_size=batch)  # type: ignore[arg-type]
    seen, left = 0, steps
    while left:
        for values in list(loader)[:left]:
            seen += len(values)
            left -= 1
    assert peer.samples_seen(steps, batch, pictures) == seen


def test_a_script_that_is_not_there_or_another_is_refused_with_where_to_get_it(tmp_path: Path) -> None:
    other = tmp_path / "train.py"
    other.write_text("pass\n")
    for script, why in ((tmp_path / "nothing.py", "no such file"), (other, "another script")):
        with pytest.raises(BadInput, match=f"{why}; expected {peer.PLACE} of the repository huggingface/diffusers, at the tag v"):
            peer.check_script(script)


def test_a_script_is_the_main_program_with_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys, pathlib\nif __name__ == '__main__':\n    pathlib.Path(sys.argv[1]).write_text(' '.join(sys.argv[2:]))\n")
    monkeypatch.setattr(sys, "argv", [])
    peer.launch([str(script), str(tmp_path / "told"), "--a", "--b=1"])
    assert (tmp_path / "told").read_text() == "--a --b=1"


def test_the_scripts_lora_becomes_ours(tmp_path: Path) -> None:
    """Saved as the script saves it, by diffusers."""
    folder = tiny_pipelines.save("sdxl", tmp_path / "teacher")
    teacher = TeacherPipeline.load(folder)
    trained = copy.deepcopy(teacher.unet)
    trained.add_adapter(lora_config(4, 4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(trained))
    StableDiffusionXLPipeline.save_lora_weights(tmp_path / "output", unet_lora_layers=layers)

    peer.convert(tmp_path / "output", folder, tmp_path / "ours", rank=4, alpha=4)
    loaded = copy.deepcopy(teacher.unet)
    load_lora(loaded, tmp_path / "ours")
    x, conditioning = torch.ones(1, *teacher.latent_shape), teacher.conditioning(["a dog"])
    outputs = []
    for unet in (trained, loaded, teacher.unet):
        denoiser = teacher.denoiser()
        denoiser.unet = unet
        with torch.no_grad():
            outputs.append(denoiser(x, torch.tensor([500]), conditioning))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)
