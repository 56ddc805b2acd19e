"""The stage `evaluate`: prompts, noise, figures and report; killed runs; equal bytes."""

import json
import re
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from infra.outside import content_digest
from infra.store import ArtifactStore
from schemas.base import digest
from schemas.errors import BadInput
from schemas.evaluation import EvaluateConfig, TransferConfig
from stages.evaluate import Inputs, run, samples, views
from stages.evaluate.curves import read_curves
from stages.evaluate.feature_network import features_of
from stages.evaluate.features import extractor_spec
from stages.evaluate.fid import FeatureStatistics, bias_warning, frechet_distance
from stages.evaluate.prompts import assign, read_prompts, seeded_order
from stages.evaluate.samples import read_pictures, square
from stages.evaluate.summary import figure
from stages.reports.charts import Series, line_chart
from stages.shards import read_samples
from tests.distilled import CAPTIONS, Chain
from tests.workspaces import make_workspace, open_store

CONFIG = EvaluateConfig(
    prompt_count=7, teacher_steps=(4, 2, 1), teacher_guidance_scale=3.0, extractor="efficientnet-lite0", grid_prompts=3, batch_size=3
)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    torch.set_num_threads(1)
    return Chain(open_store(tmp_path_factory.mktemp("chain")))


@pytest.fixture(scope="module")
def inputs(chain: Chain) -> Inputs:
    one = chain.unet(1, prediction_type="sample")
    return Inputs.model_validate(chain.inputs(lightning_8_4=chain.unet(4), lightning_8_1=one, lcm=chain.lora()))


@pytest.fixture(scope="module")
def evaluated(chain: Chain, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    manifest = run(CONFIG, inputs, make_workspace(tmp_path_factory.mktemp("first"), chain.store, identity="first"))
    return manifest, chain.store.fetch(manifest)


def copied(chain: Chain, inputs: Inputs, folder: Path) -> ArtifactStore:
    """A store with what is evaluated and no evaluation."""
    store = open_store(folder)
    for made in (chain.teacher, chain.images, chain.selection, chain.latents, *inputs.students.values()):
        store.publish(chain.store.fetch(made), identity=made.identity, content=made.content, lineage=made.lineage)
    return store


# Figures


def _by_eigenvalues(first: np.ndarray, second: np.ndarray) -> float:
    """FID from the eigenvalues of the product of covariances: not how the stage, nor clean-fid, computes it."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    one, two = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    values = np.linalg.eigvals(one @ two)
    root = np.sqrt(values.real.clip(min=0)).sum()
    return float(((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(one) + np.trace(two) - 2 * root)


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(2, 40), st.integers(2, 40), st.integers(1, 12))
def test_fid_is_that_of_the_eigenvalues_and_symmetric(seed: int, first: int, second: int, dimensions: int) -> None:
    random = np.random.default_rng(seed)
    one = random.normal(size=(first, dimensions)) * random.uniform(0.5, 2, dimensions)
    two = random.normal(size=(second, dimensions)) + random.normal(size=dimensions)
    ours = frechet_distance(FeatureStatistics.of(one), FeatureStatistics.of(two))
    scale = np.trace(np.atleast_2d(np.cov(one, rowvar=False))) + np.trace(np.atleast_2d(np.cov(two, rowvar=False)))
    if dimensions > 1:
        assert ours == pytest.approx(_by_eigenvalues(one, two), rel=1e-6, abs=1e-6 * scale)  # roots of zeros that are 1e-16 are 1e-8
    assert ours == pytest.approx(frechet_distance(FeatureStatistics.of(two), FeatureStatistics.of(one)), rel=1e-9, abs=1e-9 * scale)
    assert frechet_distance(FeatureStatistics.of(one), FeatureStatistics.of(one)) == pytest.approx(0, abs=1e-9 * scale)


def test_fid_of_two_gaussians_is_the_closed_form() -> None:
    """Diagonal Gaussians: |mu|^2 + sum (s1 - s2)^2."""
    scales, shift = np.array([1.0, 2.0, 0.5]), np.array([0.3, -1.0, 2.0])
    one = FeatureStatistics(np.zeros(3), np.diag(scales), 100)
    two = FeatureStatistics(shift, np.diag([3.0, 0.1, 0.5]), 100)
    expected = (shift**2).sum() + ((scales - [3.0, 0.1, 0.5]) ** 2).sum()
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-12)


def test_fid_needs_two_images() -> None:
    with pytest.raises(BadInput, match="expected at least 2"):
        FeatureStatistics.of(np.zeros((1, 4)))


@pytest.mark.parametrize(
    ("images", "dimensions", "told"),
    [
        (2047, 1280, "of fewer than 2048 the covariance cannot be estimated"),
        (3000, 4096, "of fewer than 4096"),
        (2048, 2048, "biased upwards"),
        (9999, 16, "biased upwards"),
        (10_000, 2048, None),
    ],
)
def test_few_images_are_told_of(images: int, dimensions: int, told: str | None) -> None:
    warning = bias_warning(images, dimensions)
    assert warning is None if told is None else told in warning


def test_features_and_fid_are_clean_fids(tmp_path: Path) -> None:
    from cleanfid import fid as clean_fid

    random = np.random.default_rng(0)
    sets = []
    for name, low in (("a", 0), ("b", 60)):
        (tmp_path / name).mkdir()
        smooth = [Image.fromarray(random.integers(low, 256, (8, 8, 3), dtype=np.uint8)).resize((48, 40)) for _ in range(20)]
        for number, picture in enumerate(smooth):
            picture.save(tmp_path / name / f"{number:03d}.png")
        sets.append([np.asarray(picture) for picture in smooth])
    extractor = extractor_spec("efficientnet-lite0").build("cpu")
    ours = [features_of(pictures, extractor, "cpu") for pictures in sets]
    theirs = clean_fid.get_folder_features(
        str(tmp_path / "a"), extractor, num_workers=0, batch_size=16, device=torch.device("cpu"), verbose=False
    )
    assert np.array_equal(ours[0], theirs)
    assert ours[0].shape == (20, 1280)
    whole = clean_fid.compute_fid(
        str(tmp_path / "a"), str(tmp_path / "b"), custom_feat_extractor=extractor, num_workers=0, batch_size=16,
        device=torch.device("cpu"), use_dataparallel=False, verbose=False,
    )  # fmt: skip
    found = frechet_distance(FeatureStatistics.of(ours[0]), FeatureStatistics.of(ours[1]))
    assert found == pytest.approx(whole, rel=1e-5)


def test_an_extractor_without_its_package_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(BadInput, match=r"cleanfid.*not installed.*diffusion-distillery\[evaluate\]"):
        extractor_spec("inception")


# Prompts


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("red apple\n\n  the cat \n")
    chosen = assign(read_prompts(path), 3, 2, "file")
    assert chosen.images == ("red apple", "red apple", "the cat", "the cat", "red apple", "red apple")
    assert chosen.distinct == 2
    path.write_text("\n  \n")
    with pytest.raises(BadInput, match="holds no prompt"):
        read_prompts(path)


def test_captions_come_in_an_order_of_the_seed_that_one_more_does_not_disturb() -> None:
    order = seeded_order(["a", "b", "c", "a", " "], 1)
    assert sorted(order) == ["a", "b", "c"]
    assert [caption for caption in seeded_order(["d", "c", "b", "a"], 1) if caption != "d"] == order
    assert len({tuple(seeded_order(list("abcdef"), seed)) for seed in range(5)}) > 1
    with pytest.raises(BadInput, match="expected a file of prompts"):
        seeded_order([""], 0)


# The stage


def test_the_artifact_holds_every_row(evaluated: tuple[Any, Path]) -> None:
    manifest, folder = evaluated
    assert set(manifest.content.scores) == {"teacher@4", "teacher@2", "teacher@1", "lightning-8-4@4", "lightning-8-1@1", "lcm@4", "lcm@2"}
    assert manifest.content.scores["teacher@4"]["fid_teacher"] > 0, "the reference has the noise of the rows"
    assert all(values["fid_real"] > 0 for values in manifest.content.scores.values())
    long = pq.read_table(folder / "rows.parquet").to_pylist()
    assert {(line["row"], line["metric"]): line["value"] for line in long} == {
        (row, metric): value for row, values in manifest.content.scores.items() for metric, value in values.items()
    }
    assert all(line["low"] <= line["high"] and line["row"] == f"{line['model']}@{line['steps']}" for line in long)
    stored = [stored for path in sorted((folder / "samples" / "lcm-at-4").glob("*.tar")) for stored in read_samples(path)]
    assert [sample.extension for sample in stored] == ["png"] * 7
    assert {sample.caption for sample in stored} == set(CAPTIONS)
    assert np.asarray(Image.open(folder / "grid.png")).std() > 0


def test_report_says_what_a_reader_must_know(evaluated: tuple[Any, Path]) -> None:
    _, folder = evaluated
    report = json.loads((folder / "report.json").read_text())
    warnings = " ".join(report["warnings"])
    assert "FID of 5 images with 1280 features means nothing by itself" in warnings
    floor = next(row["scores"]["fid_teacher"] for row in report["rows"] if row["name"] == "teacher@4")
    assert f"Two sets of the teacher's own samples, 7 each, are at FID {figure(floor)}" in warnings
    assert "5 distinct prompts" in warnings
    assert [station["count"] for station in report["funnel"]] == [9, 8, 6, 5, 5]
    assert [artifact["node"] for artifact in report["lineage"]][:3] == ["ingest", "select", "teacher"]
    assert "FID" in report["verdict"]
    assert "4 steps" in report["verdict"]


def test_report_asks_nothing_of_a_server_and_names_no_moment(evaluated: tuple[Any, Path]) -> None:
    _, folder = evaluated
    page = (folder / "report.html").read_text()
    assert page.count("<svg") >= 4
    references = re.findall(r"""(?:src|href|srcset|action|poster|data)\s*=\s*["']([^"']*)""", page)
    assert references
    assert all(reference.startswith(("data:image/", "#a-")) for reference in references)
    assert not re.search(r"https?://|url\(|@import|<link", page)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert f"script-src 'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" in page, "the page's policy admits this one"
    text = page + (folder / "report.json").read_text()
    assert not re.search(r"\b20\d\d-\d\d-\d\d", text)
    assert str(Path.home()) not in text
    assert "/tmp/" not in text
    assert len(page) < 10e6


def test_rerun_gives_equal_bytes(chain: Chain, inputs: Inputs, evaluated: tuple[Any, Path], tmp_path: Path) -> None:
    """But for the identity, which the report names. On a store of its own, which holds no rows."""
    first, folder = evaluated
    store = copied(chain, inputs, tmp_path)
    again = run(CONFIG, inputs, make_workspace(tmp_path, store, identity="again"))
    second = store.fetch(again)
    assert [entry.path for entry in again.files] == [entry.path for entry in first.files]
    for entry in first.files:
        other = (second / entry.path).read_bytes()
        for part in (slice(None), slice(12), slice(12, None), slice(8)):  # as the page shows it
            other = other.replace(again.identity[part].encode(), first.identity[part].encode())
        assert other == (folder / entry.path).read_bytes(), entry.path


class _Killed(BaseException):
    """As a signal ends a process: nothing catches it."""


class _KillAfter:
    def __init__(self, images: int) -> None:
        self.images = images

    def update(self, done: int, total: int, unit: str, figures: Mapping[str, float] | None = None) -> None:
        assert total == 8 * 7
        assert unit == "images"
        assert figures is None
        if done >= self.images:
            raise _Killed


def test_a_killed_run_goes_on_where_it_was(
    chain: Chain, inputs: Inputs, evaluated: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "SHARD_IMAGES", 4)  # two batches of three a shard, two shards a row
    store = copied(chain, inputs, tmp_path)
    for images in (2, 12, 30):
        workspace = make_workspace(tmp_path, store, identity="first")
        object.__setattr__(workspace, "progress", _KillAfter(images))
        with pytest.raises(_Killed):
            run(CONFIG, inputs, workspace)
    kept = {part.name for part in store.parts(digest("first"))}
    assert {"samples-teacher-at-4-00000", "samples-teacher-at-4-00001", "features-teacher-at-4", "samples-teacher-at-2-00000"} <= kept

    sampled: list[int] = []
    batch = samples.Sampler.batch
    monkeypatch.setattr(
        samples.Sampler, "batch", lambda self, row, denoiser, first: sampled.append(first) or batch(self, row, denoiser, first)
    )
    manifest = run(CONFIG, inputs, make_workspace(tmp_path, store, identity="first"))
    assert 0 < len(sampled) < 8 * 3

    whole, folder = evaluated
    found = store.fetch(manifest)
    for name in ("report.html", "report.json", "grid.png", "scores.parquet"):
        assert (found / name).read_bytes() == (folder / name).read_bytes(), name
    assert all(
        np.array_equal(one, two)
        for one, two in zip(read_pictures(found / "samples/lcm-at-2"), read_pictures(folder / "samples/lcm-at-2"), strict=True)
    )
    assert whole.content == manifest.content


def test_rows_of_an_earlier_evaluation_are_taken_over(
    chain: Chain, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.model_copy(update={"prompt_count": 3, "teacher_steps": (2,)})
    few = inputs.model_copy(update={"students": {"lcm": inputs.students["lcm"]}})
    store = copied(chain, inputs, tmp_path)
    drawn: list[str] = []
    looked: list[int] = []
    batch, features = samples.Sampler.batch, views.features_of
    monkeypatch.setattr(
        samples.Sampler, "batch", lambda self, row, denoiser, first: drawn.append(row.name) or batch(self, row, denoiser, first)
    )
    monkeypatch.setattr(views, "features_of", lambda *given: looked.append(1) or features(*given))

    def made(identity: str, config: EvaluateConfig, inputs: Inputs) -> tuple[Any, list[str]]:
        drawn.clear()
        looked.clear()
        found = run(config, inputs, make_workspace(tmp_path, store, identity=identity))
        assert len(looked) == len(set(drawn)) + (identity == "first"), "a picture is looked at when its row is drawn; the real ones once"
        return found, list(drawn)

    first, rows = made("first", config, few)
    assert rows == ["reference@2", "teacher@2", "lcm@4", "lcm@2"]
    wide = config.model_copy(update={"transfer": (TransferConfig(name="wide", size_px=(16, 24)),)})
    second, rows = made("second", wide, inputs.model_copy(update={"students": few.students | {"more": inputs.students["lightning-8-1"]}}))
    assert set(rows) == {"more@1"} | {
        f"{row}+wide" for row in ("reference@2", "teacher@2", "teacher@4", "teacher@1", "lcm@4", "lcm@2", "more@1")
    }
    assert first.content.scores.items() <= second.content.scores.items()
    third, rows = made("third", wide.model_copy(update={"grid_prompts": 1}), few)
    assert rows == [] and third.content.scores.items() <= second.content.scores.items()
    for change in ({"seed": 1}, {"batch_size": 2}, {"prompt_count": 2}, {"teacher_guidance_scale": 2.0}):
        _, rows = made(f"changed {change}", config.model_copy(update=change), few)
        assert {"teacher@2", "reference@2"} <= set(rows), change
        assert ("lcm@4" in rows) == ("teacher_guidance_scale" not in change)

    other = config.model_copy(update={"seed": 2})
    fourth, _ = made("fourth", other, few)
    entry = fourth.file("samples/lcm-at-4/shard-00000.tar")
    (tmp_path / "store" / "artifacts" / fourth.identity / "files" / entry.sha256[:16] / entry.path).unlink()
    _, rows = made("damaged", other.model_copy(update={"grid_prompts": 2}), few)
    assert rows == ["lcm@4"], "what is lost is drawn again"


def test_a_student_that_is_the_teacher_draws_the_teachers_pictures(chain: Chain, tmp_path: Path) -> None:
    """Prompts and starting noise of a row do not depend on whose row it is."""
    config = CONFIG.model_copy(update={"teacher_guidance_scale": 1.0, "teacher_steps": (2,), "prompt_count": 3})
    inputs = Inputs.model_validate(chain.inputs(same=chain.unet(2, change=0.0)))
    manifest = run(config, inputs, make_workspace(tmp_path, chain.store, identity="same"))
    folder = chain.store.fetch(manifest) / "samples"
    teacher, student = (list(read_pictures(folder / name)) for name in ("teacher-at-2", "same-at-2"))
    assert all(np.array_equal(one, two) for one, two in zip(teacher, student, strict=True))
    assert not np.array_equal(teacher[0], teacher[1])
    assert manifest.content.scores["same@2"] == manifest.content.scores["teacher@2"]
    reference = list(read_pictures(folder / "reference-at-2"))
    assert not any(np.array_equal(one, two) for one, two in zip(teacher, reference, strict=True)), "the reference has noise of its own"


def test_a_teacher_alone_is_evaluated_too(chain: Chain, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"prompt_count": 2, "teacher_steps": (2, 1)})
    manifest = run(config, Inputs.model_validate(chain.inputs()), make_workspace(tmp_path, chain.store, identity="alone"))
    report = json.loads((chain.store.fetch(manifest) / "report.json").read_text())
    assert report["verdict"].startswith("The teacher alone")


def test_a_student_on_another_grid_is_refused_before_sampling(chain: Chain, tmp_path: Path) -> None:
    wrong = chain.unet(2, timesteps={2: (999, 500)})
    with pytest.raises(BadInput, match=r"names the timesteps \[999, 500\], its sampler trailing uses \[999, 499\]"):
        run(CONFIG, Inputs.model_validate(chain.inputs(wrong=wrong)), make_workspace(tmp_path, chain.store, identity="wrong"))


def test_prompts_file_is_used_in_its_order(chain: Chain, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("zebra\nape\n")
    config = CONFIG.model_copy(update={"prompt_count": 2, "teacher_steps": (1,), "prompts": str(path)})
    workspace = make_workspace(tmp_path, chain.store, identity="file", outside={"prompts": str(path)})
    workspace.lineage.inputs["prompts"] = content_digest(str(path))
    manifest = run(config, Inputs.model_validate(chain.inputs()), workspace)
    shard = chain.store.fetch(manifest) / "samples/teacher-at-1/shard-00000.tar"
    assert [sample.caption for sample in read_samples(shard)] == ["zebra", "ape"]
    page = (chain.store.fetch(manifest) / "report.html").read_text()
    assert str(path) not in page
    assert sha256(path.read_bytes()).hexdigest() in page, "of the file itself"
    assert assign(["zebra", "ape"], 2, 1, "file").digest in page, "and of the prompts as the images have them"


# Small parts


def test_square_is_the_centre() -> None:
    picture = Image.new("RGB", (9, 3), "black")
    picture.paste((255, 0, 0), (3, 0, 6, 3))
    assert np.array_equal(np.asarray(square(picture, 3)), np.full((3, 3, 3), (255, 0, 0)))
    assert square(picture, 2).size == (2, 2)


def test_curves_are_thinned_to_medians(tmp_path: Path) -> None:
    import pyarrow as pa

    steps = np.arange(1, 1001)
    pq.write_table(pa.table({"step": steps, "loss": steps * 2.0, "lr": steps * 0.0}), tmp_path / "metrics.parquet")
    (curve,) = read_curves(tmp_path / "metrics.parquet").losses
    assert curve.name == "loss"
    assert len(curve.points) == 120
    assert all(value == pytest.approx(2 * step) for step, value in curve.points)


def test_a_chart_survives_one_point_and_none() -> None:
    assert line_chart([Series("a", (), 0)], title="t", x_label="x", y_label="y") == ""
    one = line_chart([Series("a<b", ((4.0, 3.0),), 0)], title="t", x_label="x", y_label="y", log_x=True, log_y=True)
    assert "nan" not in one
    assert "a&lt;b" in one
