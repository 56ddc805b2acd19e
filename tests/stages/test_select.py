"""`select`: what is measured, who passes, and that no picture of the open web can end it."""

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from safetensors.torch import save_file

from infra.store import ArtifactStore
from schemas.data import SelectConfig
from schemas.errors import BadInput, CorruptArtifact, RunFailed
from schemas.manifest import ImageShards, Manifest, Selection
from stages.measure.pictures import measure
from stages.measure.sharpness import sharpness
from stages.pictures import BrokenPictureError, decode_rgb, inspect_picture
from stages.select import Inputs, run
from stages.shards import index_shard, read_samples, shard_paths
from tests.stages.killed import Job, parts_of, run_until_it_dies
from tests.stages.killed import run as run_job
from tests.stages.pictures import encoded, hashes, noise, publish_images, sample
from tests.workspaces import make_workspace, open_store

CONFIG = SelectConfig(min_side_px=64, min_aesthetic=5.5, min_sharpness=0.02, analysis_px=32, shard_images=3, processes=1)
ORIENTATION = 0x0112


def rotated(width: int, height: int) -> bytes:
    """A JPEG whose tag says that it lies on its side."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return encoded(noise(1, width, height), "JPEG", exif=exif)


def smooth(cells: int, size: int) -> Image.Image:
    """Full contrast and no detail finer than a cell."""
    return noise(0, cells, cells).resize((size, size), Image.Resampling.BICUBIC)


def animation(size: int) -> bytes:
    frames = [noise(i, size, size) for i in range(3)]
    return encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])


def deep(mode: str, size: int) -> bytes:
    """16 bits a pixel."""
    values = np.random.default_rng(0).integers(0, 65536, (size, size), dtype=np.uint16)
    return encoded(Image.fromarray(values).convert(mode))


CASES: list[tuple[str, bytes, dict[str, Any], str | None]] = [
    ("noise", encoded(noise(0, 65, 80)), {}, None),
    ("short side not above the bound", encoded(noise(0, 64, 800)), {}, "resolution"),
    ("upright it is tall enough", rotated(100, 65), {}, None),
    ("score on the bound", encoded(noise(0, 80, 80)), {"aesthetic": 5.5}, "aesthetic"),
    ("score just above", encoded(noise(0, 80, 80)), {"aesthetic": 5.500001}, None),
    ("no score", encoded(noise(0, 80, 80)), {"aesthetic": None}, "no aesthetic score"),
    ("blurred", encoded(smooth(3, 640)), {}, "sharpness"),
    ("flat", encoded(Image.new("RGB", (80, 80), "teal")), {}, "sharpness"),
    ("cut short", encoded(noise(0, 80, 80))[:9000], {}, "unreadable"),
    ("no picture", b"<html>", {}, "unreadable"),
    ("no bytes", b"", {}, "unreadable"),
    ("a bomb", encoded(Image.new("1", (16_000, 16_000))), {}, "unreadable"),
    ("animated", animation(80), {}, "animated"),
    ("cmyk", encoded(noise(0, 80, 80).convert("CMYK"), "JPEG"), {}, None),
    ("palette", encoded(noise(0, 80, 80).convert("P")), {}, None),
    ("grey", encoded(noise(0, 80, 80).convert("L"), "JPEG"), {}, None),
    ("16 bit grey", deep("I;16", 80), {}, None),
    ("transparent", encoded(noise(0, 80, 80).convert("RGBA")), {}, None),
    ("one pixel wide", encoded(noise(0, 1, 3000)), {}, "resolution"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("select")


@pytest.fixture(scope="module")
def store(folder: Path) -> ArtifactStore:
    return open_store(folder)


@pytest.fixture(scope="module")
def images(folder: Path, store: ArtifactStore) -> Manifest[ImageShards]:
    return publish_images(
        folder, store, [sample(i, data, caption=name, **row) for i, (name, data, row, _) in enumerate(CASES)], shard_images=5
    )


@pytest.fixture(scope="module")
def selected(folder: Path, store: ArtifactStore, images: Manifest[ImageShards]) -> Manifest[Selection]:
    return run(CONFIG, Inputs(images=images), make_workspace(folder, store, identity="selection"))


def test_exactly_the_right_ones_survive_and_every_drop_has_its_reason(store: ArtifactStore, selected: Manifest[Selection]) -> None:
    place = store.fetch(selected)
    verdicts = pq.read_table(place / "verdicts.parquet").to_pylist()
    assert {row["caption"]: row["reason"] for row in verdicts} == {name: reason for name, _, _, reason in CASES}
    assert all(row["passed"] == (row["reason"] is None) for row in verdicts)
    passed = [(name, data) for name, data, _, reason in CASES if reason is None]
    assert [(one.caption, one.image) for shard in shard_paths(place) for one in read_samples(shard)] == passed
    assert selected.content.images == len(passed)
    assert selected.content.images_in == len(CASES) == len(passed) + sum(selected.content.dropped.values())
    assert selected.content.shards == -(-len(passed) // CONFIG.shard_images)


def test_measurements_are_of_the_upright_picture(store: ArtifactStore, selected: Manifest[Selection]) -> None:
    rows = {row["caption"]: row for row in pq.read_table(store.fetch(selected) / "verdicts.parquet").to_pylist()}
    assert (rows["upright it is tall enough"]["width"], rows["upright it is tall enough"]["height"]) == (65, 100)
    assert rows["cut short"]["unreadable"] == "broken image"
    assert rows["no picture"]["unreadable"] == rows["no bytes"]["unreadable"] == "not an image"
    assert rows["a bomb"]["unreadable"] == "too many pixels"


@pytest.mark.slow
def test_any_number_of_processes_makes_the_same_bytes(
    folder: Path, store: ArtifactStore, images: Manifest[ImageShards], selected: Manifest[Selection]
) -> None:
    config = CONFIG.model_copy(update={"processes": 2})
    again = run(config, Inputs(images=images), make_workspace(folder, store, identity="two processes"))
    assert hashes(again) == hashes(selected)


def test_killed_it_measures_only_what_was_left_and_makes_the_same_bytes(
    folder: Path, images: Manifest[ImageShards], selected: Manifest[Selection], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(
        stage="select",
        config=CONFIG.model_dump(mode="json"),
        inputs={"images": images.identity},
        folder=str(folder),
        identity="killed",
        die_after_parts=2,
    )
    run_until_it_dies(job)
    assert parts_of(job) == ["shard-00000", "shard-00001"]
    measured: list[str] = []
    monkeypatch.setattr("stages.measure.pictures.read_samples", lambda shard: measured.append(shard.stem) or read_samples(shard))
    assert hashes(run_job(job.model_copy(update={"die_after_parts": None}))) == hashes(selected)
    assert measured == ["shard-00002", "shard-00003"]


def test_none_left_is_a_failed_run_that_says_why(folder: Path, store: ArtifactStore, images: Manifest[ImageShards]) -> None:
    config = CONFIG.model_copy(update={"min_side_px": 5000})
    with pytest.raises(RunFailed, match=r"none of 19 images passes: unreadable 4, animated 1, resolution 14"):
        run(config, Inputs(images=images), make_workspace(folder, store, identity="none"))


def test_a_shard_cut_short_is_a_corrupt_artifact(tmp_path: Path, store: ArtifactStore, images: Manifest[ImageShards]) -> None:
    whole = shard_paths(store.fetch(images))[0].read_bytes()
    for kept in (700, len(whole) // 2):
        (tmp_path / "shard-00000.tar").write_bytes(whole[:kept])
        with pytest.raises(CorruptArtifact, match=r"shard-00000\.tar"):
            [place.read() for place in index_shard(tmp_path / "shard-00000.tar")]


class TestSharpness:
    def test_closed_forms(self) -> None:
        board = np.indices((64, 64)).sum(axis=0) % 2 * 255
        assert sharpness(Image.fromarray(board.astype(np.uint8)), 64) == pytest.approx(64, rel=0.01)
        grey = np.random.default_rng(0).normal(128, 30, (512, 512)).clip(0, 255).astype(np.uint8)
        assert sharpness(Image.fromarray(grey), 512) == pytest.approx(20, rel=0.02)
        wave = (127 + 100 * np.sin(2 * np.pi * np.arange(512) / 16))[None].repeat(512, 0)  # one frequency: gain (2 - 2 cos w)^2
        assert sharpness(Image.fromarray(wave.astype(np.uint8)), 512) == pytest.approx((2 - 2 * np.cos(2 * np.pi / 16)) ** 2, rel=0.05)

    @pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 2), (64, 64)])
    def test_flat_and_thin_pictures_have_none(self, size: tuple[int, int]) -> None:
        assert sharpness(Image.new("RGB", size, "red"), 32) == 0.0

    def test_neither_contrast_nor_size_moves_it_and_blur_does(self) -> None:
        picture = smooth(128, 1024)
        here = sharpness(picture, 256)
        assert sharpness(Image.eval(picture, lambda value: 64 + value // 2), 256) == pytest.approx(here, rel=0.05)
        assert sharpness(picture.resize((2048, 2048), Image.Resampling.BICUBIC), 256) == pytest.approx(here, rel=0.05)
        assert sharpness(picture.filter(ImageFilter.GaussianBlur(12)), 256) < here / 4


class TestHostileBytes:
    """A verdict or a counted reason, never anything else."""

    @staticmethod
    @cache
    def originals() -> list[bytes]:
        picture = noise(0, 40, 30)
        exif = Image.Exif()
        exif[ORIENTATION] = 8
        return [
            encoded(picture), encoded(picture, "JPEG", exif=exif), encoded(picture, "JPEG", progressive=True), encoded(picture, "WEBP"),
            encoded(picture.convert("P")), encoded(picture.convert("CMYK"), "JPEG"), deep("I;16", 20), animation(20), encoded(picture, "GIF"),
            encoded(picture, "TIFF"), encoded(picture, "BMP"),
        ]  # fmt: skip

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def test_damaged_files(self, data: st.DataObject) -> None:
        damaged = bytearray(data.draw(st.sampled_from(self.originals())))
        for _ in range(data.draw(st.integers(0, 6))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
        kept = bytes(damaged[: data.draw(st.integers(0, len(damaged)))]) if data.draw(st.booleans()) else bytes(damaged)
        self.judge(kept)

    @settings(max_examples=100, deadline=None)
    @given(st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\x10\x00\x00\x00WEBP", b""]), st.binary(max_size=200))
    def test_rubbish(self, magic: bytes, rest: bytes) -> None:
        self.judge(magic + rest)

    @settings(max_examples=40, deadline=None)
    @given(
        width=st.integers(1, 300),
        height=st.integers(1, 300),
        mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]),
        orientation=st.integers(0, 12),
    )
    def test_whole_files_of_any_mode_and_shape(self, width: int, height: int, mode: str, orientation: int) -> None:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        data = encoded(Image.new(mode, (width, height)), exif=exif)
        row = self.judge(data)
        assert row["unreadable"] is None
        assert (row["width"], row["height"]) == ((height, width) if orientation in (5, 6, 7, 8) else (width, height))
        facts = inspect_picture(data)
        assert (facts.width, facts.height) == (row["width"], row["height"])

    def judge(self, data: bytes) -> dict[str, Any]:
        row = measure(sample(0, data), 32)
        assert row["unreadable"] in (None, "not an image", "broken image", "unsupported format", "too many pixels")
        assert (row["unreadable"] is None) == (row["sharpness"] is not None)
        return row

    def test_transparency_lies_over_white_and_16_bits_keep_their_range(self) -> None:
        clear, _ = decode_rgb(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0))))
        assert clear.getpixel((0, 0)) == (255, 255, 255)
        grey, _ = decode_rgb(encoded(Image.fromarray(np.full((4, 4), 0x8000, np.uint16))))
        assert grey.getpixel((0, 0)) == (128, 128, 128)
        with pytest.raises(BrokenPictureError):
            decode_rgb(io.BytesIO(b"rubbish").getvalue())


class TestAesthetic:
    @pytest.fixture(scope="class")
    @staticmethod
    def predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
        from infra.torchvision_ops import define_missing_ops

        define_missing_ops()
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        place = tmp_path_factory.mktemp("predictor")
        torch.manual_seed(0)
        config = CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, projection_dim=8, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
        )
        CLIPVisionModelWithProjection(config).save_pretrained(place)
        head = {
            "layers.0.weight": torch.randn(4, 8),
            "layers.0.bias": torch.randn(4),
            "layers.7.weight": torch.randn(1, 4),
            "layers.7.bias": torch.randn(1),
        }
        save_file(head, place / "head.safetensors")
        return place

    def test_the_heads_arithmetic_in_closed_form(self, predictor: Path) -> None:
        from safetensors.torch import load_file

        from stages.measure.aesthetic import AestheticPredictor

        scorer = AestheticPredictor.load(predictor, "cpu")
        pixels = torch.rand(3, 3, 32, 32)
        head = load_file(predictor / "head.safetensors")
        mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
        with torch.no_grad():
            features = scorer.clip((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)).image_embeds
        weight = head["layers.7.weight"] @ head["layers.0.weight"]
        bias = head["layers.7.weight"] @ head["layers.0.bias"] + head["layers.7.bias"]
        expected = torch.nn.functional.normalize(features) @ weight.T + bias
        torch.testing.assert_close(scorer.score(pixels), expected[:, 0], rtol=1e-4, atol=1e-5)

    def test_only_rows_without_a_score_are_scored(
        self, predictor: Path, folder: Path, store: ArtifactStore, images: Manifest[ImageShards]
    ) -> None:
        config = CONFIG.model_copy(update={"aesthetic_predictor": "given", "min_aesthetic": -100.0})
        outside = {"aesthetic_predictor": str(predictor)}
        made = run(config, Inputs(images=images), make_workspace(folder, store, identity="scored", outside=outside))
        rows = {row["caption"]: row for row in pq.read_table(store.fetch(made) / "verdicts.parquet").to_pylist()}
        assert rows["no score"]["aesthetic"] not in (None, 6.0)
        assert rows["no score"]["passed"]
        assert rows["score on the bound"]["aesthetic"] == 5.5

    def test_what_is_no_predictor_is_refused(self, predictor: Path, tmp_path: Path) -> None:
        from stages.measure.aesthetic import AestheticPredictor

        with pytest.raises(BadInput, match="expected a CLIP model"):
            AestheticPredictor.load(tmp_path, "cpu")
        for name in ("config.json", "model.safetensors"):
            (tmp_path / name).write_bytes((predictor / name).read_bytes())
        save_file({"layers.0.weight": torch.zeros(1, 5), "layers.0.bias": torch.zeros(1)}, tmp_path / "head.safetensors")
        with pytest.raises(BadInput, match=r"layers of head.safetensors are \[\(1, 5\)\]; expected a chain from 8 features to 1"):
            AestheticPredictor.load(tmp_path, "cpu")
