"""`measure`: what is told of every picture, and that no picture of the open web can end it."""

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from safetensors.torch import save_file

from infra.store import ArtifactStore
from schemas.data import MeasureConfig, SelectConfig
from schemas.errors import BadInput, CorruptArtifact
from schemas.manifest import ImageShards, Manifest, Measurements
from stages.measure import Inputs, pictures, run
from stages.measure.pictures import MEASUREMENTS, THUMBNAILS, Measure, Slice
from stages.measure.sharpness import Tiles, high_frequency, sharpness, shrink
from stages.pictures import BrokenPictureError, decode_luma, decode_rgb, inspect_picture, upright
from stages.shards import index_shard, shard_paths
from tests.stages.killed import Job, parts_of, run_until_it_dies
from tests.stages.killed import run as run_job
from tests.stages.pictures import encoded, hashes, noise, publish_images, sample
from tests.workspaces import make_workspace, open_store

CONFIG = MeasureConfig(analysis_px=32, processes=1)
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


PICTURES: list[tuple[str, bytes, dict[str, Any]]] = [
    ("noise", encoded(noise(0, 65, 80)), {"similarity": 0.31, "watermark": 0.2, "unsafe": 0.01, "nsfw": "UNLIKELY"}),
    ("lies on its side", rotated(100, 65), {}),
    ("no score", encoded(noise(0, 80, 80)), {"aesthetic": None}),
    ("blurred", encoded(smooth(3, 640)), {}),
    ("flat", encoded(Image.new("RGB", (80, 80), "teal")), {}),
    ("cut short", encoded(noise(0, 80, 80))[:9000], {}),
    ("no picture", b"<html>", {}),
    ("no bytes", b"", {}),
    ("a bomb", encoded(Image.new("1", (16_000, 16_000))), {}),
    ("animated", animation(80), {}),
    ("cmyk", encoded(noise(0, 80, 80).convert("CMYK"), "JPEG"), {}),
    ("palette", encoded(noise(0, 80, 80).convert("P")), {}),
    ("grey", encoded(noise(0, 80, 80).convert("L"), "JPEG"), {}),
    ("16 bit grey", deep("I;16", 80), {}),
    ("transparent", encoded(noise(0, 80, 80).convert("RGBA")), {}),
    ("one pixel wide", encoded(noise(0, 1, 3000)), {}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("measure")


@pytest.fixture(scope="module")
def store(folder: Path) -> ArtifactStore:
    return open_store(folder)


@pytest.fixture(scope="module")
def images(folder: Path, store: ArtifactStore) -> Manifest[ImageShards]:
    samples = [sample(i, data, caption=name, **row) for i, (name, data, row) in enumerate(PICTURES)]
    return publish_images(folder, store, samples, shard_images=5)


@pytest.fixture(scope="module")
def measured(folder: Path, store: ArtifactStore, images: Manifest[ImageShards]) -> Manifest[Measurements]:
    return run(CONFIG, Inputs(images=images), make_workspace(folder, store, identity="measurements"))


def table(store: ArtifactStore, manifest: Manifest[Measurements], name: str = "measurements") -> pa.Table:
    """All tables of a name, one after the other."""
    return pa.concat_tables(pq.read_table(path) for path in sorted(store.fetch(manifest).glob(f"{name}-*.parquet")))


def by_caption(rows: pa.Table) -> dict[str, dict[str, Any]]:
    return {row["caption"]: row for row in rows.to_pylist()}


def test_every_picture_has_a_row_of_the_stated_columns(store: ArtifactStore, measured: Manifest[Measurements]) -> None:
    rows, thumbnails = table(store, measured), table(store, measured, "thumbnails")
    assert rows.schema == MEASUREMENTS and thumbnails.schema == THUMBNAILS
    assert rows["caption"].to_pylist() == [name for name, _, _ in PICTURES]
    assert thumbnails["key"] == rows["key"]
    assert (measured.content.images, measured.content.shards) == (len(PICTURES), -(-len(PICTURES) // 5))
    assert sorted(entry.path for entry in measured.files) == sorted(
        f"{name}-{shard:05d}.parquet" for name in ("measurements", "thumbnails") for shard in range(measured.content.shards)
    )


def test_what_the_shard_knows_of_a_picture_is_copied(store: ArtifactStore, measured: Manifest[Measurements]) -> None:
    rows = by_caption(table(store, measured))
    known = sample(0, PICTURES[0][1], **PICTURES[0][2]).row
    names = ("url", "aesthetic", "similarity", "watermark", "unsafe", "nsfw", "sha256")
    assert {name: rows["noise"][name] for name in names} == {name: known[name] for name in names}
    assert [rows["lies on its side"][name] for name in names[2:6]] == [None] * 4
    assert rows["no score"]["aesthetic"] is None


def test_measurements_are_of_the_upright_picture(store: ArtifactStore, measured: Manifest[Measurements]) -> None:
    rows = by_caption(table(store, measured))
    assert (rows["lies on its side"]["width"], rows["lies on its side"]["height"]) == (65, 100)
    assert [name for name, row in rows.items() if row["animated"]] == ["animated"]


def test_a_picture_that_does_not_decode_is_a_row_that_says_why(store: ArtifactStore, measured: Manifest[Measurements]) -> None:
    rows = by_caption(table(store, measured))
    reasons = {name: row["unreadable"] for name, row in rows.items() if row["unreadable"] is not None}
    assert reasons == {
        "cut short": "broken image", "no picture": "not an image", "no bytes": "not an image", "a bomb": "too many pixels"
    }  # fmt: skip
    for name, row in rows.items():
        numbers = [row[column] for column in ("sharpness", "high_frequency", "phash")]
        assert numbers == [None] * 3 if name in reasons else None not in numbers
        assert (row["width"] == 0) == (row["height"] == 0) == (name in reasons)


def test_thumbnails_show_the_upright_picture(store: ArtifactStore, measured: Manifest[Measurements]) -> None:
    rows, thumbnails = table(store, measured).to_pylist(), table(store, measured, "thumbnails")["thumbnail"].to_pylist()
    for row, data in zip(rows, thumbnails, strict=True):
        assert (data is None) == (row["unreadable"] is not None)
        if data is not None:
            shown = Image.open(io.BytesIO(data))
            scale = min(1, CONFIG.thumbnail_px / min(row["width"], row["height"]))
            longest = 8 * CONFIG.thumbnail_px
            assert shown.size == tuple(max(1, min(round(row[side] * scale), longest)) for side in ("width", "height"))


@pytest.mark.slow
def test_any_number_of_processes_and_of_slices_makes_the_same_bytes(
    folder: Path, store: ArtifactStore, images: Manifest[ImageShards], measured: Manifest[Measurements], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.measure.stage.SLICE_IMAGES", 2)
    for processes in (1, 2):
        config = CONFIG.model_copy(update={"processes": processes})
        again = run(config, Inputs(images=images), make_workspace(folder, store, identity=f"{processes} processes"))
        assert hashes(again) == hashes(measured)


def test_one_shard_after_the_other_is_fetched_and_let_go(
    folder: Path, store: ArtifactStore, images: Manifest[ImageShards], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[str] = []
    most = 0
    fetch, release = ArtifactStore.fetch, ArtifactStore.release

    def noted_fetch(self: ArtifactStore, manifest: Manifest[Any], paths: list[str] | None = None) -> Path:
        nonlocal most
        assert paths is not None and len(paths) == 1
        held.extend(paths)
        most = max(most, len(held))
        return fetch(self, manifest, paths)

    def noted_release(self: ArtifactStore, manifest: Manifest[Any] | None = None, paths: list[str] | None = None) -> None:
        assert paths is not None
        held.remove(*paths)
        release(self, manifest, paths)

    monkeypatch.setattr(ArtifactStore, "fetch", noted_fetch)
    monkeypatch.setattr(ArtifactStore, "release", noted_release)
    run(CONFIG, Inputs(images=images), make_workspace(folder, store, identity="one by one"))
    assert (held, most) == ([], 2)  # the one in hand and the one ahead


def test_killed_it_measures_only_what_was_left_and_makes_the_same_bytes(
    folder: Path, images: Manifest[ImageShards], measured: Manifest[Measurements], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(
        stage="measure",
        config=CONFIG.model_dump(mode="json"),
        inputs={"images": images.identity},
        folder=str(folder),
        identity="killed",
        die_after_parts=2,
    )
    run_until_it_dies(job)
    assert parts_of(job) == ["measurements-00000", "measurements-00001"]
    worked: list[int] = []
    measure_slice = pictures.measure_slice

    def noted(part: Slice, **options: Any) -> pictures.Measured:
        worked.append(part.shard)
        return measure_slice(part, **options)

    monkeypatch.setattr("stages.measure.stage.measure_slice", noted)
    assert hashes(run_job(job.model_copy(update={"die_after_parts": None}))) == hashes(measured)
    assert worked == [2, 3]


def test_a_shard_cut_short_is_a_corrupt_artifact(tmp_path: Path, store: ArtifactStore, images: Manifest[ImageShards]) -> None:
    whole = shard_paths(store.fetch(images))[0].read_bytes()
    for kept in (700, len(whole) // 2):
        (tmp_path / "shard-00000.tar").write_bytes(whole[:kept])
        with pytest.raises(CorruptArtifact, match=r"shard-00000\.tar"):
            [place.read() for place in index_shard(tmp_path / "shard-00000.tar")]


def luma(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("L"))


def sharp(picture: Image.Image, analysis_px: int) -> float:
    return sharpness(Tiles.of(shrink(luma(picture), analysis_px)))


def fine(picture: Image.Image, analysis_px: int = 1024) -> float:
    return high_frequency(luma(picture), Tiles.of(shrink(luma(picture), analysis_px)))


def natural(seed: int, width: int, height: int) -> Image.Image:
    """Noise with the spectrum of photographs: amplitude 1/f (Field 1987), a standard deviation of 50 levels."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(np.random.default_rng(seed).normal(size=(height, width))) / frequency
    values = np.fft.irfft2(spectrum, (height, width))
    return Image.fromarray((127 + 50 * values / values.std()).clip(0, 255).round().astype(np.uint8))


def blurred(picture: Image.Image, radius: float) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(radius))


def noisy(picture: Image.Image, levels: float) -> Image.Image:
    values = np.asarray(picture) + np.random.default_rng(1).normal(0, levels, (picture.height, picture.width))
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))


class TestSharpness:
    def test_closed_forms(self) -> None:
        board = np.indices((512, 512)).sum(axis=0) % 2 * 255
        most_noise = 20 * 25 / 127.5**2  # what is taken off for noise at most, over the board's variance
        assert sharp(Image.fromarray(board.astype(np.uint8)), 512) == pytest.approx(64 - most_noise, rel=1e-3)
        grey = np.random.default_rng(0).normal(128, 30, (512, 512)).clip(0, 255).astype(np.uint8)
        assert sharp(Image.fromarray(grey), 512) == pytest.approx(20 - 20 * 25 / 30**2, rel=0.1)
        wave = (127 + 100 * np.sin(2 * np.pi * np.arange(512) / 4))[None].repeat(512, 0)  # one frequency: gain (2 - 2 cos w)^2
        wave[:, :128] = 127  # and no noise
        assert sharp(Image.fromarray(wave.round().astype(np.uint8)), 512) == pytest.approx((2 - 2 * np.cos(np.pi / 2)) ** 2, rel=0.02)

    @pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 2), (3, 3), (64, 64), (300, 100)])
    def test_flat_and_thin_pictures_have_none(self, size: tuple[int, int]) -> None:
        assert sharp(Image.new("RGB", size, "red"), 32) == 0.0
        assert fine(Image.new("RGB", size, "red")) == 0.0

    def test_neither_contrast_nor_size_moves_it_and_blur_does(self) -> None:
        picture = Image.new("L", (1024, 1024), 90)
        picture.paste(smooth(128, 1024).convert("L").crop((0, 0, 400, 1024)), (0, 0))
        here = sharp(picture, 256)
        assert sharp(Image.eval(picture, lambda value: 64 + value // 2), 256) == pytest.approx(here, rel=0.05)
        assert sharp(picture.resize((2048, 2048), Image.Resampling.BICUBIC), 256) == pytest.approx(here, rel=0.05)
        assert sharp(blurred(picture, 12), 256) < here / 4

    @pytest.mark.parametrize("seed", range(3))
    def test_a_sharp_subject_before_a_blurred_sky_is_sharp_and_a_blurred_picture_is_not(self, seed: int) -> None:
        picture = natural(seed, 800, 600)
        sky = blurred(picture, 8)
        bird = sky.copy()
        bird.paste(picture.crop((256, 192, 512, 448)), (256, 192))  # a seventh of the picture
        flat = Image.new("L", (2400, 600), 140)
        flat.paste(picture.crop((0, 0, 600, 600)), (0, 0))
        bound = SelectConfig().min_sharpness
        assert sharp(picture, 600) > bound and sharp(bird, 600) > bound and sharp(flat, 600) > bound
        assert sharp(sky, 600) < bound and sharp(blurred(picture, 3), 600) < bound

    def test_noise_is_not_sharpness(self) -> None:
        picture = blurred(natural(0, 800, 600), 3)
        flat = noisy(Image.new("L", (800, 600), 128), 5)
        assert sharp(noisy(picture, 3), 600) < 2 * SelectConfig().min_sharpness
        assert sharp(flat, 600) == 0.0

    @pytest.mark.parametrize("filter_", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS])
    def test_an_enlarged_picture_has_no_high_frequencies(self, filter_: Image.Resampling) -> None:
        picture = natural(0, 640, 480)
        large = picture.resize((1280, 960), filter_)
        assert fine(picture) > 5 * fine(large)
        assert fine(picture.resize((2560, 1920), filter_)) < SelectConfig().min_high_frequency
        assert fine(picture) > 2 * SelectConfig().min_high_frequency

    def test_white_noise_fills_three_quarters_of_the_spectrum_above_half_of_nyquist(self) -> None:
        assert fine(noisy(Image.new("L", (600, 600), 128), 25)) == pytest.approx(0.75, abs=0.03)


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

    @settings(max_examples=300)
    @given(st.data())
    def test_damaged_files(self, data: st.DataObject) -> None:
        damaged = bytearray(data.draw(st.sampled_from(self.originals())))
        for _ in range(data.draw(st.integers(0, 6))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
        kept = bytes(damaged[: data.draw(st.integers(0, len(damaged)))]) if data.draw(st.booleans()) else bytes(damaged)
        self.judge(kept)

    @settings(max_examples=100)
    @given(st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\x10\x00\x00\x00WEBP", b""]), st.binary(max_size=200))
    def test_rubbish(self, magic: bytes, rest: bytes) -> None:
        self.judge(magic + rest)

    @settings(max_examples=40)
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
        measured = Measure(analysis_px=32, thumbnail_px=8)(sample(0, data))
        row = dict(measured.row)
        assert row["unreadable"] in (None, "not an image", "broken image", "unsupported format", "too many pixels")
        assert (row["unreadable"] is None) == (row["sharpness"] is not None) == (measured.thumbnail is not None)
        return row

    @pytest.mark.parametrize("size", [(1, 20_000), (20_000, 3), (20_000, 1100)])
    def test_very_long_pictures(self, size: tuple[int, int]) -> None:
        row = self.judge(encoded(Image.new("L", size, 128), "PNG"))
        assert (row["unreadable"], row["width"], row["height"]) == (None, *size)

    @pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "YCbCr"])
    @pytest.mark.parametrize("orientation", [1, 3, 6])
    def test_luma_alone_is_that_of_the_whole_picture(self, mode: str, orientation: int) -> None:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        picture = natural(0, 90, 70).convert("RGB").convert(mode)
        data = encoded(picture, "JPEG", exif=exif, quality=95)
        pixels, found, animated = decode_luma(data)
        whole, _ = decode_rgb(data)
        shown = np.asarray(upright(Image.fromarray(pixels), found), dtype=int)
        assert shown.shape == (whole.height, whole.width) and not animated
        assert np.abs(shown - np.asarray(whole.convert("L"), dtype=int)).max() <= 2

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
        pictures = list(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))
        head = load_file(predictor / "head.safetensors")
        mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
        with torch.no_grad():
            features = scorer.clip((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)).image_embeds
        weight = head["layers.7.weight"] @ head["layers.0.weight"]
        bias = head["layers.7.weight"] @ head["layers.0.bias"] + head["layers.7.bias"]
        expected = torch.nn.functional.normalize(features) @ weight.T + bias
        torch.testing.assert_close(torch.tensor(scorer.score(pictures)), expected[:, 0], rtol=1e-4, atol=1e-5)

    def test_the_published_layouts_load(self, tmp_path: Path) -> None:
        from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

        from stages.measure.aesthetic import AestheticPredictor

        vision = CLIPVisionConfig(
            projection_dim=768,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
        text = CLIPTextConfig(
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=64,
        )
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=768)).save_pretrained(tmp_path)
        pictures = list(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))

        widths = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}  # sac+logos+ava1-l14-linearMSE, dropouts between
        published = {f"layers.{n}.weight": torch.randn(o, i) / i**0.5 for n, (i, o) in widths.items()}
        published |= {f"layers.{n}.bias": torch.randn(o) for n, (_, o) in widths.items()}
        save_file(published, tmp_path / "head.safetensors")
        scorer = AestheticPredictor.load(tmp_path, "cpu")
        sequential = torch.nn.Sequential(*[torch.nn.Linear(*widths[n]) if n in widths else torch.nn.Dropout() for n in range(8)]).eval()
        sequential.load_state_dict({name.removeprefix("layers."): tensor for name, tensor in published.items()})
        single = torch.nn.Linear(768, 1)  # LAION-AI/aesthetic-predictor
        with torch.no_grad():
            mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
            pixels = (torch.from_numpy(np.stack(pictures)) / 255 - mean) / std
            features = torch.nn.functional.normalize(scorer.clip(pixels.permute(0, 3, 1, 2)).image_embeds)
            torch.testing.assert_close(torch.tensor(scorer.score(pictures)), sequential(features)[:, 0], rtol=1e-4, atol=1e-4)
            save_file(single.state_dict(), tmp_path / "head.safetensors")
            scorer = AestheticPredictor.load(tmp_path, "cpu")
            torch.testing.assert_close(torch.tensor(scorer.score(pictures)), single(features)[:, 0], rtol=1e-4, atol=1e-4)

    def test_only_rows_without_a_score_are_scored(
        self, predictor: Path, folder: Path, store: ArtifactStore, images: Manifest[ImageShards]
    ) -> None:
        config = CONFIG.model_copy(update={"aesthetic_predictor": "given"})
        outside = {"aesthetic_predictor": str(predictor)}
        rows = by_caption(
            table(store, run(config, Inputs(images=images), make_workspace(folder, store, identity="scored", outside=outside)))
        )
        assert rows["no score"]["aesthetic"] not in (None, 6.0)
        assert rows["noise"]["aesthetic"] == 6.0

    def test_what_is_no_predictor_is_refused(self, predictor: Path, tmp_path: Path) -> None:
        from stages.measure.aesthetic import AestheticPredictor

        with pytest.raises(BadInput, match="expected a CLIP model"):
            AestheticPredictor.load(tmp_path, "cpu")
        for name in ("config.json", "model.safetensors"):
            (tmp_path / name).write_bytes((predictor / name).read_bytes())
        save_file({"layers.0.weight": torch.zeros(1, 5), "layers.0.bias": torch.zeros(1)}, tmp_path / "head.safetensors")
        with pytest.raises(BadInput, match=r"layers of head.safetensors are \[\(1, 5\)\]; expected a chain from 8 features to 1"):
            AestheticPredictor.load(tmp_path, "cpu")
