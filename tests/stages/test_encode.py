"""`encode` with tiny random teachers, and the reader of what it makes."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

from infra.store import ArtifactStore
from schemas.data import EncodeConfig
from schemas.errors import BadInput
from schemas.manifest import Latents, Manifest, Teacher
from stages.diffusion.pipeline import TeacherPipeline
from stages.encode import Inputs, run
from stages.encode.crop import centre_crop, crop_pixels
from stages.latents import LatentSet
from stages.shards import Sample
from tests.stages.killed import Job, parts_of, run_until_it_dies
from tests.stages.killed import run as run_job
from tests.stages.pictures import Chosen, encoded, hashes, noise, publish_selected, sample
from tests.tiny_pipelines import Kind, save
from tests.workspaces import make_workspace, open_store

SIDE = 16
CONFIG = EncodeConfig(resolution_px=SIDE, batch_size=3, shard_samples=5)
SAMPLES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("encode")


@pytest.fixture(scope="module")
def store(folder: Path) -> ArtifactStore:
    return open_store(folder)


def pictures() -> list[Sample]:
    return [sample(i, encoded(noise(i, 20 + i, 40 - 2 * i)), caption=f"picture {i % 4}") for i in range(SAMPLES)]


@pytest.fixture(scope="module")
def chosen(folder: Path, store: ArtifactStore) -> Chosen:
    return publish_selected(folder, store, pictures(), shard_images=7)


def publish_teacher(kind: Kind, folder: Path, store: ArtifactStore) -> Manifest[Teacher]:
    content = Teacher(architecture=kind, prediction_type="epsilon", resolution=SIDE, weights_digest="0" * 64, parameters={})
    return make_workspace(folder, store, identity=f"teacher {kind}").publish(save(kind, folder / kind), content)


@pytest.fixture(scope="module")
def teacher(folder: Path, store: ArtifactStore) -> Manifest[Teacher]:
    return publish_teacher("sdxl", folder, store)


@pytest.fixture(scope="module")
def latents(folder: Path, store: ArtifactStore, chosen: Chosen, teacher: Manifest[Teacher]) -> Manifest[Latents]:
    return run(CONFIG, Inputs(**chosen, teacher=teacher), make_workspace(folder, store, identity="latents", seed=7))


@pytest.fixture(scope="module")
def encoded_set(latents: Manifest[Latents], folder: Path, store: ArtifactStore) -> LatentSet:
    return LatentSet.open(latents, make_workspace(folder, store))


def test_every_sample_is_what_the_teacher_makes_of_its_crop_and_caption(
    encoded_set: LatentSet, latents: Manifest[Latents], teacher: Manifest[Teacher], store: ArtifactStore
) -> None:
    pipeline = TeacherPipeline.load(store.fetch(teacher))
    index = pq.read_table(store.fetch(latents) / "index.parquet").to_pylist()
    assert sorted(row["key"] for row in index) == [one.key for one in pictures()]
    for i, row in enumerate(index):
        number = int(row["key"])
        width, height = 20 + number, 40 - 2 * number
        assert (row["original_width"], row["original_height"], row["caption"]) == (width, height, f"picture {number % 4}")
        latent, conditioning = encoded_set.samples([i])
        crop = centre_crop(width, height, SIDE)
        pixels = crop_pixels(noise(number, width, height), crop)[None]
        torch.testing.assert_close(latent, pipeline.encode_images(pixels), rtol=1e-5, atol=1e-6)
        expected = pipeline.encode_prompts([row["caption"]])
        assert expected.pooled is not None and conditioning.pooled is not None and conditioning.time_ids is not None
        torch.testing.assert_close(conditioning.prompt_embeds, expected.prompt_embeds, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(conditioning.pooled, expected.pooled, rtol=1e-5, atol=1e-6)
        assert conditioning.time_ids.tolist() == [[height, width, row["crop_top"], row["crop_left"], SIDE, SIDE]]


def test_the_reader_gives_any_samples_in_any_order(encoded_set: LatentSet) -> None:
    wanted = [11, 0, 5, 5, 3]
    latents, conditioning = encoded_set.samples(wanted)
    for place, index in enumerate(wanted):
        alone, text = encoded_set.samples([index])
        assert torch.equal(latents[place], alone[0])
        assert torch.equal(conditioning.prompt_embeds[place], text.prompt_embeds[0])
    assert len(encoded_set) == SAMPLES == len(encoded_set.captions)
    assert latents.shape[1:] == encoded_set.latent_shape
    with pytest.raises(IndexError, match="sample 12: expected 0 to 11"):
        encoded_set.samples([12])
    copy = pickle.loads(pickle.dumps(encoded_set))
    assert torch.equal(copy.samples(wanted)[0], latents)


def test_the_unconditional_embedding_is_by_the_pipelines_own_rule(encoded_set: LatentSet) -> None:
    time_ids = encoded_set.samples([0, 1])[1].time_ids
    nothing = encoded_set.unconditional(2, time_ids)
    assert nothing.pooled is not None
    assert nothing.prompt_embeds.shape[0] == 2
    assert not nothing.prompt_embeds.any() and not nothing.pooled.any(), "SDXL: zeros"
    assert nothing.time_ids is time_ids


def test_the_order_is_shuffled_by_the_seed_alone(
    folder: Path, store: ArtifactStore, chosen: Chosen, teacher: Manifest[Teacher], latents: Manifest[Latents]
) -> None:
    def keys(manifest: Manifest[Latents]) -> list[str]:
        found: list[str] = pq.read_table(store.fetch(manifest) / "index.parquet")["key"].to_pylist()
        return found

    inputs = Inputs(**chosen, teacher=teacher)
    same = run(CONFIG, inputs, make_workspace(folder, store, identity="again", seed=7))
    other = run(CONFIG, inputs, make_workspace(folder, store, identity="other seed", seed=8))
    assert hashes(same) == hashes(latents)
    assert keys(latents) != sorted(keys(latents)) != keys(other) != keys(latents)
    assert sorted(keys(other)) == sorted(keys(latents))


@pytest.mark.slow
def test_killed_it_encodes_only_what_was_left_and_makes_the_same_bytes(
    folder: Path, chosen: Chosen, teacher: Manifest[Teacher], latents: Manifest[Latents], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {name: manifest.identity for name, manifest in (chosen | {"teacher": teacher}).items()}
    job = Job(
        stage="encode", config=CONFIG.model_dump(mode="json"), inputs=inputs, folder=str(folder),
        identity="killed", seed=7, die_after_parts=1,
    )  # fmt: skip
    run_until_it_dies(job)
    assert parts_of(job) == ["latents-00000"]
    seen = 0
    encode_images = TeacherPipeline.encode_images

    def counted(self: TeacherPipeline, pixels: torch.Tensor, at_once: int | None = None) -> torch.Tensor:
        nonlocal seen
        seen += len(pixels)
        return encode_images(self, pixels, at_once)

    monkeypatch.setattr(TeacherPipeline, "encode_images", counted)
    assert hashes(run_job(job.model_copy(update={"die_after_parts": None}))) == hashes(latents)
    assert seen == SAMPLES - CONFIG.shard_samples


def test_a_caption_is_encoded_and_stored_once_in_the_whole_set(  # noqa: PLR0917 - fixtures
    folder: Path,
    store: ArtifactStore,
    chosen: Chosen,
    teacher: Manifest[Teacher],
    latents: Manifest[Latents],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts: list[str] = []
    encode_prompts = TeacherPipeline.encode_prompts
    monkeypatch.setattr(TeacherPipeline, "encode_prompts", lambda self, texts: prompts.extend(texts) or encode_prompts(self, texts))
    again = run(CONFIG, Inputs(**chosen, teacher=teacher), make_workspace(folder, store, identity="text once", seed=7))
    assert hashes(again) == hashes(latents)
    assert sorted(prompts) == [f"picture {i}" for i in range(4)]
    assert latents.content.shards == 3 and latents.content.captions == 4
    stored = 0
    for number in range(3):
        with safe_open(store.fetch(latents) / f"latents-{number:05d}.safetensors", framework="pt") as file:
            stored += file.get_slice("prompt_embeds").get_shape()[0] if "prompt_embeds" in file.keys() else 0  # noqa: SIM118
    assert stored == 4


def test_a_teacher_without_pooled_text_and_bfloat16_storage(folder: Path, store: ArtifactStore, chosen: Chosen) -> None:
    config = CONFIG.model_copy(update={"text_dtype": "bfloat16", "vae_dtype": "bfloat16"})
    inputs = Inputs(**chosen, teacher=publish_teacher("sd15", folder, store))
    made = run(config, inputs, make_workspace(folder, store, identity="sd15"))
    one = LatentSet.open(made, make_workspace(folder, store))
    latents, conditioning = one.samples([0, 7])
    assert latents.dtype == conditioning.prompt_embeds.dtype == torch.float32
    assert conditioning.pooled is None and conditioning.time_ids is None
    assert one.unconditional(1).prompt_embeds.any(), 'SD1.5: the embedding of ""'
    assert torch.equal(conditioning.prompt_embeds, conditioning.prompt_embeds.bfloat16().float())


@pytest.mark.parametrize("refused", [(64, "12 selected images are smaller, the first 0000000000 with 20 x 40"), (15, "multiple of")])
def test_a_resolution_that_does_not_suit_is_refused_before_work(
    folder: Path, store: ArtifactStore, chosen: Chosen, teacher: Manifest[Teacher], refused: tuple[int, str]
) -> None:
    side, message = refused
    config = CONFIG.model_copy(update={"resolution_px": side})
    with pytest.raises(BadInput, match=message):
        run(config, Inputs(**chosen, teacher=teacher), make_workspace(folder, store, identity=f"side {side}"))


class TestCrop:
    @given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([8, 64, 512]))
    def test_the_crop_lies_inside_and_in_the_middle(self, width: int, height: int, side: int) -> None:
        if min(width, height) < side:
            with pytest.raises(ValueError, match="cannot be shrunk"):
                centre_crop(width, height, side)
            return
        crop = centre_crop(width, height, side)
        assert min(crop.top, crop.left) == 0
        scale = min(width, height) / side
        for start, length in ((crop.top, height), (crop.left, width)):
            before, after = start * scale, length - (start + side) * scale
            assert before >= 0 and after > -scale
            assert abs(before - after) <= 2 * scale

    def test_the_region_read_is_the_one_named(self) -> None:
        columns = np.linspace(0, 255, 300).astype(np.uint8)[None, :, None].repeat(100, 0).repeat(3, 2)
        crop = centre_crop(300, 100, 50)
        assert (crop.original_hw, crop.top, crop.left) == ((100, 300), 0, 50)
        pixels = crop_pixels(Image.fromarray(np.ascontiguousarray(columns)), crop)
        assert pixels.shape == (3, 50, 50)
        shrunk = (pixels[0, 25] + 1) * 127.5
        expected = torch.tensor([(50 + i + 0.5) * 2 / 300 * 255 for i in range(50)])
        torch.testing.assert_close(shrunk, expected, atol=2.0, rtol=0)

    def test_pixels_span_minus_one_to_one(self) -> None:
        white = crop_pixels(Image.new("RGB", (32, 32), "white"), centre_crop(32, 32, 16))
        black = crop_pixels(Image.new("RGB", (32, 32), "black"), centre_crop(32, 32, 16))
        assert white.min() == white.max() == 1.0
        assert black.min() == black.max() == -1.0
