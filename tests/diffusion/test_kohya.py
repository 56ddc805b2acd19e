"""LoRAs in kohya's key format: diffusers reads them as what they were, and so do we, bit for bit."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from schemas.errors import BadInput
from stages.diffusion.kohya import kohya_module, load_kohya, save_kohya
from stages.diffusion.lora import LORA_TARGETS, add_lora, lora_state, save_lora
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.sampling import image_generator
from tests import tiny_pipelines
from tests.architectures import SDXL
from tests.diffusion.test_lora import RANK, output, stir


@pytest.fixture(scope="module", params=[*tiny_pipelines.KINDS, "ssd-1b"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.save(request.param, tmp_path_factory.mktemp("pipelines") / request.param)


def stirred(folder: Path, alpha: float = 6.5) -> TeacherPipeline:
    teacher = TeacherPipeline.load(folder)
    add_lora(teacher.unet, RANK, alpha, seed=0)
    stir(teacher.unet)
    return teacher


@pytest.mark.parametrize("alpha", [6.5, 0.1])
def test_a_plain_pipeline_draws_the_same_pictures_from_either_file(folder: Path, tmp_path: Path, alpha: float) -> None:
    teacher = stirred(folder, alpha)
    ours = save_lora(teacher.unet, tmp_path)
    kohya = tmp_path / "style.safetensors"
    save_kohya(tmp_path, teacher.unet.config, kohya)

    def drawn(file: Path) -> tuple[torch.Tensor, torch.Tensor]:
        plain = diffusers.DiffusionPipeline.from_pretrained(folder)
        plain.set_progress_bar_config(disable=True)
        plain.load_lora_weights(file)
        assert {(config.r, config.lora_alpha) for config in plain.unet.peft_config.values()} == {(RANK, alpha)}
        pictures = plain(["the red cat"], num_inference_steps=2, generator=[image_generator(0, 0)], output_type="pt").images
        return pictures, output(teacher, plain.unet)

    for read, expected in zip(drawn(kohya), drawn(ours), strict=True):
        assert torch.equal(read, expected)

    again = TeacherPipeline.load(folder)
    assert all(parameter.requires_grad for parameter in load_kohya(again.unet, kohya))
    before = lora_state(teacher.unet)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora_state(again.unet).items())
    assert torch.equal(output(again), output(teacher))
    save_lora(again.unet, tmp_path / "again")
    assert (tmp_path / "again" / ours.name).read_bytes() == ours.read_bytes()
    save_kohya(tmp_path / "again", again.unet.config, tmp_path / "twice.safetensors")
    assert (tmp_path / "twice.safetensors").read_bytes() == kohya.read_bytes()


def test_every_layer_of_sdxl_has_the_name_that_diffusers_reads_as_that_layer() -> None:
    with torch.device("meta"):
        kind: Any = diffusers.UNet2DConditionModel
        unet = kind(**SDXL)
    modules = [name for name, _ in unet.named_modules() if name.endswith(tuple(f".{target}" for target in LORA_TARGETS))]
    names = {module: kohya_module(module, unet.config) for module in modules}
    assert len(set(names.values())) == len(modules) == 788
    known = {
        "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
        "down_blocks.1.attentions.0.proj_in": "input_blocks_4_1_proj_in",
        "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj": "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj",
        "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": "middle_block_1_transformer_blocks_0_attn2_to_out_0",
        "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
        "up_blocks.2.resnets.2.conv_shortcut": "output_blocks_8_0_skip_connection",
    }
    assert known.items() <= names.items()
    state = {}
    for number, name in enumerate(names.values()):
        state |= {
            f"lora_unet_{name}.lora_down.weight": torch.tensor([[number]]),
            f"lora_unet_{name}.lora_up.weight": torch.tensor([[number]]),
        }
    read: Any = diffusers.StableDiffusionXLPipeline.lora_state_dict(state, unet_config=unet.config)
    found = {name.removeprefix("unet."): int(tensor) for name, tensor in convert_unet_state_dict_to_peft(read[0]).items()}
    assert found == {f"{module}.lora_{half}.weight": number for number, module in enumerate(modules) for half in "AB"}


def test_the_file_says_which_model_it_is_for(folder: Path, tmp_path: Path) -> None:
    teacher = stirred(folder)
    save_lora(teacher.unet, tmp_path)
    save_kohya(tmp_path, teacher.unet.config, tmp_path / "style.safetensors")
    with safe_open(tmp_path / "style.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (str(RANK), "6.5")
    xl = {"ss_base_model_version": "sdxl_base_v1-0"}
    version = {"sd15": {"ss_v2": "False"}, "sd2-v": {"ss_v2": "True"}, "sdxl": xl, "ssd-1b": xl}[folder.name]
    assert version.items() <= metadata.items()
    tensors = load_file(tmp_path / "style.safetensors")
    assert {name.partition("_")[0] for name in tensors} == {"lora"} and len(tensors) == 3 * len(lora_state(teacher.unet)) // 2
    assert any("input_blocks" in name for name in tensors) is (folder.name in ("sdxl", "ssd-1b"))


def test_diffusers_own_writer_loses_alpha(folder: Path) -> None:
    """Why there is a writer of ours: fails when diffusers' has become right."""
    written = convert_state_dict_to_kohya({f"unet.{name}": tensor for name, tensor in lora_state(stirred(folder).unet).items()})
    assert {int(tensor) for name, tensor in written.items() if name.endswith(".alpha")} == {RANK}


def test_files_that_are_for_another_network_are_refused(tmp_path: Path) -> None:
    folder = tiny_pipelines.save("sd15", tmp_path / "sd15")
    teacher = stirred(folder)
    save_lora(teacher.unet, tmp_path)
    path = tmp_path / "style.safetensors"
    save_kohya(tmp_path, teacher.unet.config, path)
    tensors, fresh = load_file(path), TeacherPipeline.load(folder).unet
    with pytest.raises(BadInput, match="cannot be read"):
        load_kohya(fresh, tmp_path / "nothing.safetensors")
    first = min(tensors)
    changes: list[tuple[dict[str, torch.Tensor], set[str], str]] = [
        ({}, {first.partition(".")[0] + ".lora_up.weight"}, "has no lora_unet_down_blocks_0"),
        ({"lora_unet_conv_in.lora_up.weight": torch.zeros(1)}, set(), "lora_unet_conv_in.lora_up.weight is of no layer of this UNet"),
        ({first: torch.tensor(1.0)}, set(), r"\(rank, alpha\) of its modules are \[\(4, 1.0\), \(4, 6.5\)\]"),
    ]
    for added, left_out, expected in changes:
        save_file({name: tensor for name, tensor in (tensors | added).items() if name not in left_out}, path)
        with pytest.raises(BadInput, match=expected):
            load_kohya(TeacherPipeline.load(folder).unet, path)
    with pytest.raises(BadInput, match="UNet layer conv_in: has no name in the SGM network"):
        kohya_module("conv_in", SDXL | {"layers_per_block": 2})
