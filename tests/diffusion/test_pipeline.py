"""Teacher pipelines: their own rules for text, latents and time ids, against diffusers' pipelines and against first principles."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from schemas.errors import BadInput
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.pipeline import TeacherPipeline, inspect
from tests import tiny_pipelines

PROMPTS = ["the red cat", "a dog, 2 birds and very many more words than fit"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: tiny_pipelines.save(kind, root / kind) for kind in tiny_pipelines.KINDS}


@pytest.fixture(params=tiny_pipelines.KINDS)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture
def sdxl(folders: dict[str, Path]) -> TeacherPipeline:
    return TeacherPipeline.load(folders["sdxl"])


def plain(folder: Path) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_facts_are_found_without_loading(folders: dict[str, Path]) -> None:
    facts = inspect(folders["sdxl"])
    assert (facts.architecture, facts.prediction_type) == ("StableDiffusionXLPipeline", "epsilon")
    assert (facts.resolution, facts.latent_shape, facts.scaling_factor) == (16, (4, 8, 8), 0.13025)
    pipeline = tiny_pipelines.build("sdxl")
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert facts.parameters[name] == sum(parameter.numel() for parameter in getattr(pipeline, name).parameters())
    assert inspect(folders["sd2-v"]).prediction_type == "v_prediction"
    assert inspect(folders["sd15"]).scaling_factor == 0.18215


def test_prompts_are_encoded_as_the_pipeline_does(folder: Path) -> None:
    teacher = TeacherPipeline.load(folder)
    with torch.no_grad():
        expected = plain(folder).encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    found, unconditional = teacher.encode_prompts(PROMPTS), teacher.unconditional().expand(2)
    assert torch.equal(found.prompt_embeds, expected[0])
    assert torch.allclose(unconditional.prompt_embeds, expected[1], atol=1e-6)  # a batch of one and of two may differ in the last bit
    if teacher.micro_conditioned:
        assert found.pooled is not None and torch.equal(found.pooled, expected[2])
        assert unconditional.pooled is not None and torch.equal(unconditional.pooled, expected[3])
    else:
        assert found.pooled is None and unconditional.pooled is None


def test_sdxl_joins_penultimate_states_of_both_encoders_and_pools_the_second(sdxl: TeacherPipeline) -> None:
    first, second = sdxl.tokenizers
    assert first.pad_token_id != second.pad_token_id
    ids = [words(PROMPTS, padding="max_length", max_length=12, truncation=True, return_tensors="pt").input_ids for words in (first, second)]
    assert ids[0][0, -1] == first.eos_token_id
    assert ids[1][0, -1] == second.convert_tokens_to_ids("!") == 0
    with torch.no_grad():
        states = [encoder(i, output_hidden_states=True) for encoder, i in zip(sdxl.text_encoders, ids, strict=True)]
    found = sdxl.encode_prompts(PROMPTS)
    assert torch.equal(found.prompt_embeds, torch.cat([state.hidden_states[-2] for state in states], dim=-1))
    assert found.pooled is not None and torch.equal(found.pooled, states[1].text_embeds)
    assert found.prompt_embeds.shape == (2, 12, 16 + 24)
    assert found.pooled.shape == (2, 20)


def test_sdxl_without_text_is_zeros_and_sd_encodes_the_empty_prompt(folders: dict[str, Path]) -> None:
    sdxl = TeacherPipeline.load(folders["sdxl"]).unconditional()
    assert not sdxl.prompt_embeds.any()
    assert sdxl.pooled is not None and not sdxl.pooled.any()
    sd15 = TeacherPipeline.load(folders["sd15"])
    assert torch.equal(sd15.unconditional().prompt_embeds, sd15.encode_prompts([""]).prompt_embeds)
    assert sd15.unconditional().prompt_embeds.any()


def test_an_sdxl_pipeline_that_does_not_force_zeros_encodes_the_empty_prompt(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["sdxl"], tmp_path / "sdxl")
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    teacher = TeacherPipeline.load(folder)
    assert torch.equal(teacher.unconditional().prompt_embeds, teacher.encode_prompts([""]).prompt_embeds)


def test_time_ids_are_original_size_crop_and_target_size(folders: dict[str, Path], sdxl: TeacherPipeline) -> None:
    found = sdxl.time_ids((768, 1024), (3, 5), (512, 640))
    assert found is not None and found.tolist() == [[768, 1024, 3, 5, 512, 640]]
    reference = plain(folders["sdxl"])._get_add_time_ids((16, 16), (0, 0), (16, 16), torch.float32, 20)
    native = sdxl.time_ids(batch=3)
    assert native is not None and torch.equal(native, reference.repeat(3, 1))
    assert TeacherPipeline.load(folders["sd15"]).time_ids() is None
    assert sdxl.conditioning(PROMPTS).time_ids is not None


def test_images_become_the_scaled_mean_of_the_posterior_and_back(folder: Path) -> None:
    teacher = TeacherPipeline.load(folder)
    pixels = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = teacher.encode_images(pixels)
    with torch.no_grad():
        assert torch.equal(latents, teacher.vae.encode(pixels).latent_dist.mode() * teacher.vae.config.scaling_factor)
    assert latents.shape == (3, 4, 8, 12)
    pictures = teacher.decode(latents)
    assert pictures.shape == (3, 3, 16, 24)
    assert 0 <= pictures.min() < pictures.max() <= 1
    with pytest.raises(BadInput, match="multiples of 2"):
        teacher.encode_images(pixels[:, :, :15])


def test_decoding_in_slices_changes_nothing(sdxl: TeacherPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = sdxl.decode(latents)
    monkeypatch.setattr("stages.diffusion.pipeline._DECODED_PIXELS", 2 * 16 * 16)
    assert torch.allclose(sdxl.decode(latents), whole, atol=1e-6)


def test_the_vae_of_sdxl_stays_in_float32_beside_half_precision(folders: dict[str, Path]) -> None:
    half = TeacherPipeline.load(folders["sdxl"], dtype=torch.float16)
    assert (half.dtype, half.vae.dtype) == (torch.float16, torch.float32)
    assert TeacherPipeline.load(folders["sd15"], dtype=torch.float16).vae.dtype == torch.float16
    assert TeacherPipeline.load(folders["sdxl"], dtype=torch.bfloat16).vae.dtype == torch.bfloat16
    assert half.decode(torch.zeros(1, 4, 8, 8)).dtype == torch.float32


def test_an_sdxl_denoiser_needs_its_micro_conditioning(sdxl: TeacherPipeline) -> None:
    with pytest.raises(ValueError, match="time ids"):
        sdxl.denoiser()(torch.zeros(1, 4, 8, 8), torch.tensor([5]), Conditioning(torch.zeros(1, 12, 40)))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _pickle_only(path: Path) -> None:
    path.rename(path.with_suffix(".bin"))


UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        ("sd15", lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"), "pipeline 'FluxPipeline' is not supported"),
        ("sd15", lambda f: edit(f / "model_index.json", unet=["diffusers", "FluxTransformer2DModel"]), "unet 'FluxTransformer2DModel'"),
        ("sd15", lambda f: edit(f / "model_index.json", unet=["my_code", "UNet2DConditionModel"]), "'my_code'.*never run"),
        (
            "sd15",
            lambda f: edit(f / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]),
            "scheduler 'FlowMatch",
        ),
        ("sdxl", lambda f: edit(f / "model_index.json", text_encoder=[None, None]), "has no text_encoder"),
        ("sdxl", lambda f: edit(f / "model_index.json", requires_aesthetics_score=True), "refiner"),
        ("sdxl", lambda f: edit(f / "unet/config.json", addition_embed_type=None), "addition_embed_type None"),
        ("sd15", lambda f: edit(f / "unet/config.json", in_channels=9), "in_channels 9.*inpainting"),
        ("sd15", lambda f: edit(f / "unet/config.json", time_cond_proj_dim=256), "time_cond_proj_dim 256"),
        ("sd15", lambda f: edit(f / "vae/config.json", shift_factor=0.1), "shift_factor is not supported"),
        ("sdxl", lambda f: edit(f / "vae/config.json", latents_mean=[0, 0, 0, 0]), "latents_mean is not supported"),
        ("sd15", lambda f: edit(f / "scheduler/scheduler_config.json", prediction_type="flow"), "prediction_type 'flow'"),
        ("sd15", lambda f: edit(f / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True), "divides by zero"),
        ("sd15", lambda f: (f / "model_index.json").unlink(), "model_index.json: missing"),
        ("sd15", lambda f: (f / "model_index.json").write_text("{"), "cannot be read as JSON"),
        ("sd15", lambda f: (f / "vae/config.json").unlink(), "vae/config.json: missing"),
        ("sdxl", lambda f: shutil.rmtree(f / "tokenizer_2"), "tokenizer_2: no vocabulary"),
        ("sd15", lambda f: (f / UNET).unlink(), "unet: no safetensors weights.*found no weights"),
        ("sd15", lambda f: _pickle_only(f / UNET), r"found diffusion_pytorch_model\.bin"),
        ("sd15", lambda f: _truncate(f / UNET), "cut short"),
        ("sd15", lambda f: (f / UNET).write_bytes(b"PK\x03\x04" + bytes(100)), "not a complete safetensors file"),
    ],
)
def test_what_is_not_supported_or_broken_is_refused_by_name(
    folders: dict[str, Path], tmp_path: Path, kind: str, spoil: Any, message: str
) -> None:
    folder = shutil.copytree(folders[kind], tmp_path / kind)
    spoil(folder)
    with pytest.raises(BadInput, match=message):
        inspect(folder)


def test_weights_that_do_not_fill_the_network_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["sd15"], tmp_path / "sd15")
    weights = load_file(folder / UNET)
    del weights["conv_in.weight"]
    save_file(weights, folder / UNET, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"do not fit.*conv_in\.weight"):
        TeacherPipeline.load(folder)
    edit(folder / "unet/config.json", block_out_channels=[8, 32])
    with pytest.raises(BadInput, match="do not fit"):
        TeacherPipeline.load(folder)


def test_files_with_the_names_of_older_releases_load(folders: dict[str, Path], tmp_path: Path) -> None:
    """SD1.5 and SDXL as they lie on the hub: `text_model.` prefixes, stored position ids, the VAE's attention by its first names."""
    folder = shutil.copytree(folders["sd15"], tmp_path / "sd15")
    text = load_file(folder / "text_encoder/model.safetensors")
    old = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in text.items()}
    save_file(
        old | {"text_model.embeddings.position_ids": torch.arange(12)[None]}, folder / "text_encoder/model.safetensors", {"format": "pt"}
    )
    vae = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    first_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in first_names.items():
        vae = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in vae.items()}
    save_file(vae, folder / "vae/diffusion_pytorch_model.safetensors", {"format": "pt"})
    found, expected = TeacherPipeline.load(folder), TeacherPipeline.load(folders["sd15"])
    assert found.facts.parameters == expected.facts.parameters
    assert torch.equal(found.encode_prompts(PROMPTS).prompt_embeds, expected.encode_prompts(PROMPTS).prompt_embeds)
    assert torch.equal(found.decode(torch.ones(1, 4, 8, 8)), expected.decode(torch.ones(1, 4, 8, 8)))


def test_conditionings_are_cut_joined_and_moved() -> None:
    whole = Conditioning(torch.randn(3, 2, 4), torch.randn(3, 5), torch.arange(18.0).reshape(3, 6))
    again = Conditioning.cat([whole[0], whole[1:]])
    assert again.batch == 3
    for name in ("prompt_embeds", "pooled", "time_ids"):
        assert torch.equal(getattr(again, name), getattr(whole, name))
    assert torch.equal(whole[-1].prompt_embeds, whole.prompt_embeds[2:])
    assert torch.equal(whole[[2, 0]].prompt_embeds, whole.prompt_embeds[[2, 0]])
    half = whole.to(dtype=torch.bfloat16)
    assert half.prompt_embeds.dtype == torch.bfloat16
    assert half.time_ids is not None and half.time_ids.dtype == torch.float32
    with pytest.raises(ValueError, match="pooled: given for 1 of 2"):
        Conditioning.cat([whole, Conditioning(whole.prompt_embeds)])
