"""`encode` at scale, small: processes, memory that runs out, bounded disk, shards by size, text made on the fly, and what a plan says of it."""

import itertools
import json
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from infra.store import ArtifactStore, StoreSettings
from schemas.data import AspectConfig, EncodeConfig
from schemas.errors import BadInput, CorruptArtifact, RunFailed
from schemas.lcm import LcmConfig
from schemas.lightning import LinkConfig
from schemas.manifest import Latents, Manifest, Teacher
from schemas.teacher import TrainTeacherConfig
from stages import lcm, lightning
from stages.diffusion.pipeline import TeacherPipeline
from stages.encode import Inputs, run
from stages.encode import shard as shard_module
from stages.encode import stage as stage_module
from stages.encode.crop import centre_crop, random_crop
from stages.encode.order import shuffled, text_places
from stages.encode_cost import EncodeCost
from stages.encoded_size import EncodedSize, encoded_size, human, size_of_trained
from stages.latents import LatentSet
from stages.parallel import devices_of
from stages.training.latent_batches import reader
from tests.services import ObjectStore
from tests.stages.killed import Job, parts_of, start
from tests.stages.pictures import Chosen, encoded, hashes, noise, publish_selected, sample
from tests.stages.test_encode import CONFIG, SAMPLES, SIDE, pictures, publish_teacher
from tests.tiny_pipelines import KINDS
from tests.workspaces import make_workspace, open_store

FLOAT_ERROR: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("encode")


@pytest.fixture(scope="module")
def store(folder: Path) -> ArtifactStore:
    return open_store(folder)


@pytest.fixture(scope="module")
def chosen(folder: Path, store: ArtifactStore) -> Chosen:
    return publish_selected(folder, store, pictures(), shard_images=5)


@pytest.fixture(scope="module")
def teacher(folder: Path, store: ArtifactStore) -> Manifest[Teacher]:
    return publish_teacher("sdxl", folder, store)


class Place:
    """Where `encode` runs, and on what."""

    def __init__(self, folder: Path, store: ArtifactStore, chosen: Chosen, teacher: Manifest[Teacher]) -> None:
        self.folder, self.store, self.chosen, self.teacher = folder, store, chosen, teacher
        self._runs = itertools.count()

    def run(self, seed: int = 7, **changes: Any) -> Manifest[Latents]:
        """Make an artifact of its own."""
        workspace = make_workspace(self.folder, self.store, identity=f"run {next(self._runs)}", seed=seed)
        return run(CONFIG.model_copy(update=changes), Inputs(**self.chosen, teacher=self.teacher), workspace)

    def index(self, manifest: Manifest[Latents]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = pq.read_table(self.store.fetch(manifest) / "index.parquet").to_pylist()
        return rows

    def open(self, manifest: Manifest[Latents]) -> LatentSet:
        return LatentSet.open(manifest, make_workspace(self.folder, self.store), self.teacher)


@pytest.fixture(scope="module")
def place(folder: Path, store: ArtifactStore, chosen: Chosen, teacher: Manifest[Teacher]) -> Place:
    return Place(folder, store, chosen, teacher)


@pytest.fixture(scope="module")
def latents(place: Place) -> Manifest[Latents]:
    return place.run()


@pytest.mark.slow
def test_two_processes_killed_and_run_again_make_the_bytes_of_one(place: Place, latents: Manifest[Latents]) -> None:
    config = CONFIG.model_copy(update={"processes": 2})
    inputs = {name: manifest.identity for name, manifest in (place.chosen | {"teacher": place.teacher}).items()}
    job = Job(
        stage="encode", config=config.model_dump(mode="json"), inputs=inputs, folder=str(place.folder), identity="two processes", seed=7
    )  # fmt: skip
    process = start(job)
    deadline = time.monotonic() + 120
    while not parts_of(job):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    workspace = make_workspace(place.folder, place.store, identity="two processes", seed=7)
    kept = {part.name: part.files for part in workspace.parts()}
    made = run(config, Inputs(**place.chosen, teacher=place.teacher), workspace)
    assert kept and hashes(made) == hashes(latents)


def test_processes_and_devices_are_no_part_of_the_identity_and_the_batch_is() -> None:
    assert CONFIG.model_copy(update={"processes": 8}).identity_fields() == CONFIG.identity_fields()
    assert CONFIG.model_copy(update={"batch_size": "auto"}).identity_fields() != CONFIG.identity_fields()


def test_each_process_gets_a_device(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert devices_of("cuda", 3, "encode.processes") == ("cuda:0", "cuda:1", "cuda:2")
    assert devices_of("cuda:2", 3, "encode.processes") == ("cuda:2",)
    assert devices_of("cpu", 3, "encode.processes") == ("cpu",)
    with caplog.at_level(logging.WARNING):
        assert len(devices_of("cuda", 9, "encode.processes")) == 4
    assert "this machine has 4 CUDA device(s)" in caplog.text


class SmallMemory:
    """A device on which no more than `fits` pictures go through the VAE together."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fits: int) -> None:
        self.fits = fits
        self.batches: list[int] = []
        encode_images = TeacherPipeline.encode_images

        def limited(pipeline: TeacherPipeline, pixels: torch.Tensor, at_once: int | None = None) -> torch.Tensor:
            self.batches.append(len(pixels))
            if len(pixels) > self.fits:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return encode_images(pipeline, pixels, at_once)

        monkeypatch.setattr(TeacherPipeline, "encode_images", limited)


def test_out_of_memory_the_batch_is_halved_and_the_shard_goes_on(
    place: Place, latents: Manifest[Latents], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory = SmallMemory(monkeypatch, fits=2)
    with caplog.at_level(logging.WARNING):
        made = place.run(batch_size=5)
    assert memory.batches == [5, 2, 2, 1, 2, 2, 1, 2], "5 fail once; what follows stays halved"
    assert "out of memory with 5 pictures of 16 px at once" in caplog.text
    expected, found = place.open(latents), place.open(made)
    assert [row["key"] for row in place.index(made)] == [row["key"] for row in place.index(latents)]
    torch.testing.assert_close(found.samples(range(SAMPLES))[0], expected.samples(range(SAMPLES))[0], **FLOAT_ERROR)


def test_where_one_picture_does_not_fit_it_says_what_helps(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    SmallMemory(monkeypatch, fits=0)
    with pytest.raises(RunFailed, match=r"one picture of 16 x 16 pixels does not fit the memory of cpu: expected encode\.vae_tiling"):
        place.run()


def test_the_batch_that_fits_is_found_once_and_kept(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SmallMemory(monkeypatch, fits=3)
    workspace = make_workspace(place.folder, place.store, identity="trial", seed=7, device="meta")  # any device but the CPU is tried
    monkeypatch.setattr(shard_module.ShardEncoder, "__init__", _on_cpu(shard_module.ShardEncoder.__init__))
    monkeypatch.setattr(stage_module, "_PIXELS_TRIED", 8 * SIDE**2)
    monkeypatch.setattr(stage_module, "_unconditional", lambda _teacher, _device: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG.model_copy(update={"batch_size": "auto"}), Inputs(**place.chosen, teacher=place.teacher), workspace)
    assert memory.batches == [8, 4, 2, *[2, 2, 1] * 2, 2], "8 and 4 fail; 2 fit, and shards of 5 are made by twos"
    notes = {part.name: part.note for part in workspace.parts()}
    assert notes["batch-size"] == {"pictures": 2}
    memory.fits, memory.batches = 100, []
    workspace.delete_parts(["latents-00001"])
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG.model_copy(update={"batch_size": "auto"}), Inputs(**place.chosen, teacher=place.teacher), workspace)
    assert memory.batches == [2, 2, 1], "with more memory than before it goes on as it began"


def _on_cpu(init: Any) -> Any:
    return lambda self, work, _device: init(self, work, "cpu")


def test_auto_is_one_megapixel_on_a_cpu_and_more_to_begin_with_elsewhere() -> None:
    auto = CONFIG.model_copy(update={"batch_size": "auto"})
    assert [stage_module.first_batch(auto, "cpu", side) for side in (64, 512, 1024, 2048)] == [256, 4, 1, 1]
    assert [stage_module.first_batch(auto, "cuda", side) for side in (512, 1024, 4096)] == [32, 8, 1]
    assert stage_module.first_batch(CONFIG, "cuda", 1024) == CONFIG.batch_size


def test_latents_that_are_not_finite_name_their_picture(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_images = TeacherPipeline.encode_images

    def overflowing(pipeline: TeacherPipeline, pixels: torch.Tensor, at_once: int | None = None) -> torch.Tensor:
        made = encode_images(pipeline, pixels, at_once)
        made[-1, 0, 0, 0] = math.inf
        return made

    monkeypatch.setattr(TeacherPipeline, "encode_images", overflowing)
    with pytest.raises(RunFailed, match=r"the latents of \d{10} are not finite: the VAE overflows"):
        place.run()


def test_no_image_shard_comes_to_this_machine_and_no_latents_either(
    place: Place, latents: Manifest[Latents], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    loaded: list[str] = []
    fetch, load_part = ArtifactStore.fetch, ArtifactStore.load_part

    def noting_fetch(store: ArtifactStore, manifest: Manifest[Any], paths: Sequence[str] | None = None) -> Path:
        fetched.extend(f"{manifest.kind}/{path}" for path in (paths or [entry.path for entry in manifest.files]))
        return fetch(store, manifest, paths)

    def noting_load(store: ArtifactStore, identity: str, part: Any, destination: Path, paths: Sequence[str] | None = None) -> Path:
        loaded.extend(paths or [entry.path for entry in part.files])
        return load_part(store, identity, part, destination, paths)

    monkeypatch.setattr(ArtifactStore, "fetch", noting_fetch)
    monkeypatch.setattr(ArtifactStore, "load_part", noting_load)
    assert hashes(place.run()) == hashes(latents)
    assert not [path for path in fetched if path.endswith(".tar")]
    assert set(loaded) == {"index.parquet"}


@pytest.mark.service
def test_on_an_object_store_the_bytes_are_the_same(
    place: Place, latents: Manifest[Latents], seaweedfs: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in seaweedfs.environment.items():
        monkeypatch.setenv(name, value)
    address, cache = f"s3://{seaweedfs.bucket}/encode", tmp_path / "cache"
    store = ArtifactStore.open(address, StoreSettings(cache_dir=tmp_path / "cache of the fixtures"))
    chosen, teacher = publish_selected(tmp_path, store, pictures(), shard_images=5), publish_teacher("sdxl", tmp_path, store)
    away = Place(tmp_path, ArtifactStore.open(address, StoreSettings(cache_dir=cache)), chosen, teacher)
    assert hashes(away.run()) == hashes(latents)
    here = [path.name for path in cache.rglob("*") if path.is_file()]
    assert "verdicts.parquet" in here
    assert not [name for name in here if name.endswith(".tar") or name.startswith("latents-")]


def test_a_picture_whose_bytes_changed_is_named(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    chosen = publish_selected(tmp_path, store, pictures()[:3])
    place = Place(tmp_path, store, chosen, publish_teacher("sd15", tmp_path, store))
    entry = chosen["images"].file("shard-00000.tar")
    shard = next((tmp_path / "store").rglob(entry.path))
    data = bytearray(shard.read_bytes())
    data[data.index(b"IDAT") + 40] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    with pytest.raises(CorruptArtifact, match=r"shard-00000.tar: picture 0000000000: expected SHA-256 [0-9a-f]{64}, found [0-9a-f]{64}"):
        place.run()


class TestAspect:
    def test_elongated_pictures_are_left_out_and_counted(self, place: Place) -> None:
        made = place.run(aspect=AspectConfig(max_ratio=1.6), resolution_px=8)
        sizes = {f"{i:010d}": (20 + i, 40 - 2 * i) for i in range(SAMPLES)}
        kept = {key for key, size in sizes.items() if max(size) <= 1.6 * min(size)}
        assert 0 < len(kept) < SAMPLES
        assert {row["key"] for row in place.index(made)} == kept
        assert made.content.dropped == {"aspect ratio": SAMPLES - len(kept)}
        assert made.content.samples == len(kept)
        with pytest.raises(RunFailed, match=r"all 12 selected images are more elongated than encode\.aspect\.max_ratio = 1\.0"):
            Place(place.folder, place.store, publish_tall(place.folder, place.store), place.teacher).run(aspect=AspectConfig(max_ratio=1))

    def test_a_random_crop_is_the_one_that_time_ids_name(self, place: Place, latents: Manifest[Latents]) -> None:
        made = place.run(aspect=AspectConfig(crop="random"))
        moved = [
            (row["crop_top"], row["crop_left"]) != (centre["crop_top"], centre["crop_left"])
            for row, centre in zip(place.index(made), place.index(latents), strict=True)
        ]
        assert any(moved)
        time_ids = place.open(made).samples(range(SAMPLES))[1].time_ids
        assert time_ids is not None
        assert time_ids[:, 2:4].tolist() == [[row["crop_top"], row["crop_left"]] for row in place.index(made)]

    @given(st.integers(64, 3000), st.integers(64, 3000), st.integers(0, 2**31), st.text(max_size=10))
    def test_it_lies_inside_and_is_a_function_of_seed_and_key(self, width: int, height: int, seed: int, key: str) -> None:
        crop, centre = random_crop(width, height, 64, seed, key), centre_crop(width, height, 64)
        assert crop == random_crop(width, height, 64, seed, key)
        assert 0 <= crop.top <= 2 * centre.top + 1 and 0 <= crop.left <= 2 * centre.left + 1
        assert min(crop.top, crop.left) == 0

    def test_it_is_spread_over_all_positions(self) -> None:
        found = [random_crop(120, 60, 60, 1, str(i)).left for i in range(2000)]
        assert min(found) == 0 and max(found) == 60 and abs(np.mean(found) - 30) < 1.5


def publish_tall(folder: Path, store: ArtifactStore) -> Chosen:
    work = folder / "tall"
    work.mkdir(exist_ok=True)
    return publish_selected(work, store, [sample(i, encoded(noise(i, 16, 40 + i))) for i in range(12)])


class TestOrder:
    @given(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 9))
    def test_every_caption_lies_once_where_every_sample_looks_for_it(self, captions: list[str], shard_samples: int, seed: int) -> None:
        order = shuffled(pa.chunked_array([[f"{i}" for i in range(len(captions))]]), seed)
        assert sorted(order) == list(range(len(captions)))
        places = text_places(pa.chunked_array([pa.array(captions, pa.large_string())]), order, shard_samples)
        stored: dict[int, list[str]] = {}
        for sample_number, row in enumerate(order):
            if places["text_new"][sample_number]:
                stored.setdefault(sample_number // shard_samples, []).append(captions[row])
        assert sorted(itertools.chain(*stored.values())) == sorted(set(captions))
        for sample_number, row in enumerate(order):
            assert stored[int(places["text_shard"][sample_number])][int(places["text_row"][sample_number])] == captions[row]


class TestSize:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("text_dtype", ["float32", "bfloat16"])
    def test_the_plan_knows_what_the_shards_will_take(self, tmp_path: Path, kind: Any, text_dtype: Any) -> None:
        store = open_store(tmp_path)
        many = [sample(i, encoded(noise(i, SIDE, SIDE)), caption=f"caption {i}") for i in range(40)]
        place = Place(tmp_path, store, publish_selected(tmp_path, store, many, shard_images=40), publish_teacher(kind, tmp_path, store))
        config = CONFIG.model_copy(update={"shard_samples": 40, "text_dtype": text_dtype, "batch_size": 40})
        size = encoded_size(store.fetch(place.teacher), config)
        for text in ("precomputed", "on_the_fly"):
            made = place.run(**config.model_dump(include={"shard_samples", "text_dtype", "batch_size"}), text=text)
            found = sum(entry.size for entry in made.files if entry.path.startswith("latents-"))
            cost = EncodeCost(text, size, made.content.samples, "select")
            assert cost.total(text == "precomputed") == pytest.approx(found, rel=0.02)

    def test_shards_too_large_to_copy_are_refused_before_work(self, place: Place) -> None:
        size = encoded_size(place.store.fetch(place.teacher), CONFIG)
        most = 5 * 10**9 // size.sample(CONFIG)
        with pytest.raises(BadInput, match=rf"a shard of 5\.0 GB; expected at most {most} samples"):
            place.run(shard_samples=most + 1)

    def test_of_sdxl(self, tmp_path: Path) -> None:
        sdxl_configs(tmp_path)
        config = EncodeConfig(resolution_px=1024)
        size = encoded_size(tmp_path, config)
        assert size == EncodedSize(latents=4 * 128 * 128 * 4 + 24, text=(77 * 2048 + 1280) * 4)
        assert size.shard_samples(config) == 512_000_000 // (size.latents + size.text)
        on_the_fly = config.model_copy(update={"text": "on_the_fly", "shard_mb": 1024})
        assert size.shard_samples(on_the_fly) == 1_024_000_000 // size.latents
        assert size.shard_samples(config.model_copy(update={"shard_samples": 7})) == 7
        cost = EncodeCost("precomputed", size, 100_000, "select")
        assert cost.sentence() == (
            "encode: 636 KB text + 262 KB latents a sample: 100,000 samples 90 GB precomputed, 26 GB on the fly; this recipe: precomputed"
        )
        assert "at most 100,000 samples (by the table's rows)" in EncodeCost("on_the_fly", size, 100_000, "the table's rows").sentence()
        assert EncodeCost("precomputed", size, None, "the table's rows").sentence() == "encode: 636 KB text + 262 KB latents a sample"
        assert "once the teacher's configuration files are here" in EncodeCost("precomputed", None, 5, "select").sentence()

    def test_configurations_that_do_not_tell_are_named(self, tmp_path: Path) -> None:
        sdxl_configs(tmp_path)
        (tmp_path / "tokenizer" / "tokenizer_config.json").write_text("{}")
        with pytest.raises(BadInput, match=r"do not tell the size of an encoded sample .*model_max_length"):
            encoded_size(tmp_path, EncodeConfig())

    def test_of_a_teacher_yet_to_be_trained(self) -> None:
        recipe = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "tiny-teacher.yaml").read_text())
        made = encoded_size(Path(__file__).parents[2] / "recipes" / "tiny_teacher", EncodeConfig())
        assert size_of_trained(TrainTeacherConfig.model_validate(recipe["train_teacher"]), EncodeConfig()) == made

    def test_figures_are_short(self) -> None:
        assert [human(size) for size in (7, 999, 1000, 9_949, 9_951, 630_784, 999_600, 76 * 10**9, 5 * 10**15)] == [
            "7 bytes", "999 bytes", "1.0 KB", "9.9 KB", "10 KB", "631 KB", "1.0 MB", "76 GB", "5000 TB",
        ]  # fmt: skip


def sdxl_configs(folder: Path) -> None:
    """The entries of SDXL base 1.0's configuration files that tell sizes."""
    configs: dict[str, dict[str, Any]] = {
        "unet/config.json": {"sample_size": 128},
        "vae/config.json": {"latent_channels": 4, "block_out_channels": [128, 256, 512, 512]},
        "text_encoder/config.json": {"hidden_size": 768, "projection_dim": 768},
        "text_encoder_2/config.json": {"hidden_size": 1280, "projection_dim": 1280},
        "tokenizer/tokenizer_config.json": {"model_max_length": 77},
    }
    for path, content in configs.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content))


@pytest.fixture(scope="module")
def without_text(place: Place) -> Manifest[Latents]:
    return place.run(text="on_the_fly")


class TestOnTheFly:
    def test_samples_are_those_of_a_set_with_text(self, place: Place, latents: Manifest[Latents], without_text: Manifest[Latents]) -> None:
        with safe_open(place.store.fetch(without_text) / "latents-00000.safetensors", framework="pt") as file:
            assert set(file.keys()) == {"latents", "time_ids"}
        wanted = [3, 3, 11, 0, 7]
        stored, made = place.open(latents), place.open(without_text)
        (a, of_a), (b, of_b) = stored.samples(wanted), made.samples(wanted)
        assert torch.equal(a, b)
        assert of_a.pooled is not None and of_b.pooled is not None and of_a.time_ids is not None and of_b.time_ids is not None
        assert torch.equal(of_a.time_ids, of_b.time_ids)
        torch.testing.assert_close(of_b.prompt_embeds, of_a.prompt_embeds, **FLOAT_ERROR)
        torch.testing.assert_close(of_b.pooled, of_a.pooled, **FLOAT_ERROR)
        assert torch.equal(made.unconditional(2).prompt_embeds, stored.unconditional(2).prompt_embeds)
        assert made.captions.to_pylist() == stored.captions.to_pylist()

    def test_without_a_teacher_it_is_refused(self, place: Place, without_text: Manifest[Latents]) -> None:
        with pytest.raises(BadInput, match=r"hold no text embeddings .*; expected a teacher to make them"):
            LatentSet.open(without_text, make_workspace(place.folder, place.store))

    @pytest.mark.parametrize("method", ["lightning", "lcm"])
    def test_training_is_the_same_within_float_error(
        self, place: Place, latents: Manifest[Latents], without_text: Manifest[Latents], method: str
    ) -> None:
        settings: dict[str, Any] = {"training_steps": 3, "batch_size": 4, "optimizer": {"learning_rate": 1e-3}}
        losses = []
        for number, encoded_set in enumerate((latents, without_text)):
            workspace = make_workspace(place.folder, place.store, identity=f"{method} {number}")
            if method == "lightning":
                link = LinkConfig.model_validate(settings | {"teacher_steps": 8, "steps": 4, "guidance_scale": 6.0})
                made = lightning.run(link, lightning.Inputs(teacher=place.teacher, latents=encoded_set), workspace)
            else:
                config = LcmConfig.model_validate(settings | {"lora_rank": 4, "lora_alpha": 4, "steps": [4]})
                made = lcm.run(config, lcm.Inputs(teacher=place.teacher, latents=encoded_set), workspace)
            losses.append(pq.read_table(place.store.fetch(made) / "metrics.parquet")["student.loss"].to_pylist())
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        assert len(set(losses[0])) == 3

    def test_the_reader_of_training_gives_whole_batches(self, place: Place, without_text: Manifest[Latents]) -> None:
        batch = reader(place.open(without_text))([0, 4]).to(torch.device("cpu"))
        assert batch.conditioning.prompt_embeds.shape[0] == len(batch.latents) == 2
        assert batch.conditioning.time_ids is not None


def test_slicing_and_tiling_are_the_vaes_own(place: Place, latents: Manifest[Latents]) -> None:
    whole = place.open(latents).samples(range(SAMPLES))[0]
    sliced = place.open(place.run(vae_slicing=True)).samples(range(SAMPLES))[0]
    torch.testing.assert_close(sliced, whole, **FLOAT_ERROR)
    tiled = place.open(place.run(vae_tiling=True)).samples(range(SAMPLES))[0]
    torch.testing.assert_close(tiled, whole, **FLOAT_ERROR)  # no larger than the VAE's sample_size: one tile


def test_the_vae_computes_in_what_the_teacher_needs(place: Place, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"vae_dtype": "teacher"})
    for upcast, expected in ((True, torch.float32), (False, torch.bfloat16), (None, torch.float32)):
        (tmp_path / "vae").mkdir(exist_ok=True)
        (tmp_path / "vae" / "config.json").write_text(json.dumps({} if upcast is None else {"force_upcast": upcast}))
        assert shard_module.vae_dtype(config, tmp_path) == expected
    shutil.rmtree(tmp_path / "vae")
    assert shard_module.vae_dtype(CONFIG, tmp_path) == torch.float32
