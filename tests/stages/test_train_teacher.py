"""`train-teacher`: a complete pipeline from pictures, the same after a kill, and the arithmetic of its losses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from schemas.errors import BadInput
from schemas.teacher import TrainTeacherConfig
from stages.denoising import min_snr_weight
from stages.diffusion.pipeline import TeacherPipeline
from stages.train_teacher import Inputs, run
from stages.train_teacher.autoencoder import encode_all, standardise
from stages.train_teacher.denoiser import encode_tokens
from stages.train_teacher.networks import assemble_pipeline, build_autoencoder, build_text_encoders, build_unet, seeded
from stages.train_teacher.vocabulary import END, START, build_tokenizers
from tests.stages.killed import Job, parts_of, run_until_it_dies
from tests.stages.pictures import encoded, hashes, noise, publish_selected, sample
from tests.workspaces import make_workspace, open_store

CAPTIONS = ("red apple", "zebra emoji", "a drawing of a bus")


def config(**more: Any) -> TrainTeacherConfig:
    """Networks of a few thousand weights, a few steps of each."""
    training = {"training_steps": 6, "batch_size": 4, "checkpoint_every": 2}
    settings = {
        "resolution_px": 16,
        "max_tokens": 8,
        "vocabulary_size": 600,
        "autoencoder": {
            "block_out_channels": (8, 8),
            "norm_num_groups": 4,
            "crop_px": 8,
            "training": training,
            "optimizer": {"learning_rate": 1e-3},
        },
        "text_encoders": ({"hidden_size": 8, "projection_dim": 12}, {"hidden_size": 16, "projection_dim": 12}),
        "unet": {"block_out_channels": (8, 16), "attention_levels": (False, True), "attention_heads": (1, 2), "norm_num_groups": 4},
        "training": training | {"ema_decay": 0.9},
        "optimizer": {"learning_rate": 1e-3},
    }
    return TrainTeacherConfig.model_validate(settings | more)


def inputs(folder: Path, side: int = 20, count: int = 9) -> Inputs:
    store = open_store(folder)
    pictures = [sample(number, encoded(noise(number, side, side + number)), caption=CAPTIONS[number % 3]) for number in range(count)]
    return Inputs(**publish_selected(folder, store, pictures, shard_images=5))


def test_the_pipeline_draws_and_a_killed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    chosen = inputs(tmp_path)
    store = open_store(tmp_path)
    whole = run(config(), chosen, make_workspace(tmp_path, store, identity="whole"))

    job = Job(
        stage="train-teacher",
        config=config().model_dump(mode="json"),
        inputs={"images": chosen.images.identity, "selection": chosen.selection.identity},
        folder=str(tmp_path),
        identity="killed",
    )
    for kept in (1, 3):  # in the autoencoder's training, then in the denoiser's
        run_until_it_dies(job.model_copy(update={"die_after_parts": kept}))
    assert any(name.startswith("denoiser") for name in parts_of(job))
    resumed = run(config(), chosen, make_workspace(tmp_path, store, identity="killed"))
    assert hashes(resumed) == hashes(whole)

    folder = store.fetch(whole)
    assert {tensor.dtype for tensor in load_file(folder / "unet/diffusion_pytorch_model.safetensors").values()} == {torch.float16}
    plain: Any = StableDiffusionXLPipeline.from_pretrained(folder)
    assert {plain.unet.dtype, plain.text_encoder.dtype, plain.text_encoder_2.dtype} == {torch.float32}, "loads whole without naming a type"
    teacher = TeacherPipeline.load(folder)
    assert (teacher.resolution, teacher.latent_shape, teacher.prediction.name) == (16, (4, 8, 8), "epsilon")
    assert float(teacher.unconditional().prompt_embeds.abs().max()) == 0
    [picture] = teacher.diffusers()("red apple", num_inference_steps=2, guidance_scale=3.0, output_type="pt").images
    assert picture.shape == (3, 16, 16)
    assert torch.isfinite(picture).all()


def test_a_picture_that_would_be_enlarged_is_refused(tmp_path: Path) -> None:
    chosen = inputs(tmp_path, side=15, count=1)
    with pytest.raises(BadInput, match="resolution_px = 16: picture 0000000000 is 15 x 15"):
        run(config(), chosen, make_workspace(tmp_path, open_store(tmp_path)))


def test_standardised_latents_are_of_unit_spread_and_decode_as_before() -> None:
    with seeded(0):
        vae = build_autoencoder(config().autoencoder, 16)
    pictures = torch.randint(0, 256, (6, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    raw = encode_all(vae, pictures)
    before = vae.decode(raw).sample
    scaled = standardise(vae, raw)
    again = encode_all(vae, pictures)
    torch.testing.assert_close(again * vae.config.scaling_factor, scaled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(again).sample, before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scaled.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(scaled.std((0, 2, 3)), torch.ones(4), rtol=1e-4, atol=0)


def test_captions_are_encoded_as_the_pipeline_encodes_them() -> None:
    settings = config()
    tokenizers = build_tokenizers(CAPTIONS, settings.vocabulary_size, settings.max_tokens)
    with seeded(0):
        encoders = build_text_encoders(settings, tokenizers)
        unet = build_unet(settings.unet, latent_channels=4, latent_side=8, text=settings.text_encoders)
        pipeline = assemble_pipeline(build_autoencoder(settings.autoencoder, 16), encoders, tokenizers, unet, "epsilon")
    expected = pipeline.encode_prompt(list(CAPTIONS), do_classifier_free_guidance=False)
    tokens = [
        tokenizer(list(CAPTIONS), padding="max_length", truncation=True, max_length=settings.max_tokens, return_tensors="pt").input_ids
        for tokenizer in tokenizers
    ]
    hidden, pooled = encode_tokens(encoders, (tokens[0], tokens[1]))
    assert torch.equal(hidden, expected[0])
    assert torch.equal(pooled, expected[2])


def test_min_snr_weights() -> None:
    """arXiv 2303.09556, 3.4: min(SNR, gamma) for x0, over SNR for noise, over SNR + 1 for velocity."""
    snr = torch.tensor([0.1, 5.0, 20.0])
    torch.testing.assert_close(min_snr_weight(snr, 5.0, "epsilon"), torch.tensor([1.0, 1.0, 0.25]))
    torch.testing.assert_close(min_snr_weight(snr, 5.0, "v_prediction"), torch.tensor([0.1 / 1.1, 5 / 6, 5 / 21]))
    torch.testing.assert_close(min_snr_weight(snr, 5.0, "sample"), torch.tensor([0.1, 5.0, 5.0]))
    assert min_snr_weight(snr, None, "epsilon").tolist() == [1, 1, 1]


TOKENIZERS = build_tokenizers(CAPTIONS, 600, 8)


@given(st.text(st.characters(codec="utf-8", exclude_characters="!")))  # the second tokenizer's padding, and so no text to it, as in SDXL
def test_any_text_is_tokens_between_start_and_end(text: str) -> None:
    first, second = (tokenizer(text, padding="max_length", truncation=True, max_length=8).input_ids for tokenizer in TOKENIZERS)
    start, end = TOKENIZERS[0].convert_tokens_to_ids([START, END])
    assert len(first) == len(second) == 8
    assert first[0] == second[0] == start
    assert end in first
    assert max(first + second) < len(TOKENIZERS[0])
    length = first.index(end) + 1
    assert first[:length] == second[:length]
    assert set(first[length:]) <= {end}
    assert set(second[length:]) <= {second[-1]} and (length == 8 or second[-1] != end)
