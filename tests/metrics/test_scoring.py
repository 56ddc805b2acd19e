"""The stage `evaluate` with every metric, its intervals in the artifact, and pictures that are too small."""

import importlib
import json
import operator
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from markupsafe import escape
from PIL import Image

from infra.outside import content_digest
from schemas.base import digest
from schemas.errors import BadInput
from schemas.evaluation import EvaluateConfig, PerceptualConfig
from schemas.loading import parse_recipe
from stages.evaluate import Inputs, reference, run
from stages.evaluate.feature_network import features_of
from stages.evaluate.features import extractor_spec
from stages.evaluate.fid import FeatureStatistics, frechet_distance
from stages.evaluate.metrics.catalogue import METRICS
from stages.evaluate.samples import read_pictures
from stages.evaluate.singles import load_distance
from stages.evaluate.timing import interval_of_median
from stages.evaluate.views import centre_patch
from stages.plan import make_plan
from tests.distilled import Chain
from tests.tiny_pipelines import tiny_clip
from tests.workspaces import make_workspace, open_store

CONFIG = EvaluateConfig(
    prompt_count=5, images_per_prompt=2, teacher_steps=(2, 1), teacher_guidance_scale=2.0, extractor="efficientnet-lite0", grid_prompts=1,
    batch_size=5, metrics=("fid", "patch_fid", "kid", "precision_recall", "clip_score", "lpips", "diversity"), patch_px=12, clip_model="clip",
    perceptual=PerceptualConfig(distance="lpips-efficientnet-lite0", size_px=64), resamples=200, timing=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    torch.set_num_threads(1)
    return Chain(open_store(tmp_path_factory.mktemp("chain")))


@pytest.fixture(scope="module")
def evaluated(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    manifest = scored(chain, CONFIG, tmp_path_factory.mktemp("scored"), "scored", one=chain.unet(1))
    return manifest, chain.store.fetch(manifest)


def scored(chain: Chain, config: EvaluateConfig, folder: Path, identity: str, **students: Any) -> Any:
    workspace = make_workspace(folder, chain.store, identity=identity, outside={"clip_model": str(tiny_clip(folder / "clip"))})
    lineage = workspace.lineage.model_copy(update={"inputs": {"clip_model": digest("tiny CLIP")}})
    return run(config, Inputs.model_validate(chain.inputs(**students)), replace(workspace, lineage=lineage))


def test_every_score_has_an_interval_that_holds_it(evaluated: tuple[Any, Path]) -> None:
    manifest, folder = evaluated
    expected = set(METRICS) - {f"{name}_{reference}" for name in ("density", "coverage") for reference in ("teacher", "real")}
    for row, scores in manifest.content.scores.items():
        assert set(scores) == set(manifest.content.intervals[row]) == expected
        for metric, value in scores.items():
            low, high = manifest.content.intervals[row][metric]
            assert low - 1e-6 <= value <= high + 1e-6, (row, metric)
    assert all(manifest.content.intervals["one@1"]["fid_real"][0] < values["fid_real"] for values in [manifest.content.scores["one@1"]])
    table = pq.read_table(folder / "scores.parquet").to_pylist()
    assert table[0]["kid_real_low"] <= table[0]["kid_real"] <= table[0]["kid_real_high"]


def test_one_student_more_has_its_own_pictures_looked_at_and_no_others(
    chain: Chain, evaluated: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []

    def counted(place: str, name: str) -> None:
        original = operator.attrgetter(name)(importlib.import_module(place))
        monkeypatch.setattr(f"{place}.{name}", lambda *given: looked.append(name) or original(*given))

    for place, name in (
        ("stages.evaluate.singles", "paired"),
        ("stages.evaluate.singles", "diversity"),
        ("stages.evaluate.metrics.clip_score", "ClipScorer.scores"),
        ("stages.evaluate.views", "features_of"),
        ("stages.evaluate.samples", "Sampler.batch"),
    ):
        counted(place, name)
    students = {"one": chain.unet(1), "two": chain.unet(2)}
    config = CONFIG.model_copy(update={"timing": None})
    more = scored(chain, config, tmp_path, "one more", **students)
    once = {"paired": 1, "diversity": 1, "ClipScorer.scores": 1}
    assert Counter(looked) == once | {"features_of": 2, "Sampler.batch": 2}, "whole pictures and their middles; two batches"
    assert evaluated[0].content.scores.items() <= more.content.scores.items()
    assert evaluated[0].content.intervals.items() <= more.content.intervals.items()
    looked.clear()
    scored(chain, config.model_copy(update={"clip_prefix": "A photo depicts "}), tmp_path, "prefixed", **students)
    assert Counter(looked) == {"ClipScorer.scores": 4}, "every row, and nothing else"


def test_patch_fid_is_the_fid_of_the_middles(evaluated: tuple[Any, Path]) -> None:
    manifest, folder = evaluated
    extractor = extractor_spec("efficientnet-lite0").build("cpu")

    def statistics(row: str) -> FeatureStatistics:
        middles = [picture[2:14, 2:14] for picture in read_pictures(folder / "samples" / row)]
        return FeatureStatistics.of(features_of(middles, extractor, "cpu"))

    expected = frechet_distance(statistics("one-at-1"), statistics("reference-at-2"))
    assert manifest.content.scores["one@1"]["patch_fid_teacher"] == pytest.approx(expected, rel=1e-6)


def test_perceptual_distances_are_those_of_the_pictures(evaluated: tuple[Any, Path]) -> None:
    manifest, folder = evaluated
    distance = load_distance(CONFIG.perceptual, None, "cpu")

    def pictures(row: str) -> torch.Tensor:
        return torch.from_numpy(np.stack(list(read_pictures(folder / "samples" / row)))).permute(0, 3, 1, 2) / 127.5 - 1

    teacher, student = pictures("teacher-at-2"), pictures("one-at-1")
    with torch.no_grad():
        apart, within = distance(student, teacher).mean().item(), distance(student[::2], student[1::2]).mean().item()
    scores = manifest.content.scores
    assert scores["one@1"]["lpips_teacher"] == pytest.approx(apart, rel=1e-4)
    assert scores["one@1"]["diversity"] == pytest.approx(within, rel=1e-4)
    assert scores["teacher@2"]["lpips_teacher"] == 0, "the reference's own noise"
    assert apart > 0


def test_the_report_shows_metrics_intervals_and_speed(evaluated: tuple[Any, Path]) -> None:
    _, folder = evaluated
    report, page = json.loads((folder / "report.json").read_text()), (folder / "report.html").read_text()
    assert report["intervals"] == {"confidence": 0.95, "resamples": 200}
    for title in report["metrics"].values():
        assert escape(title) in page
    assert "higher is better" in page
    for row in report["rows"]:
        for figure, ends in (("latency_seconds", "latency_interval"), ("images_per_second", "throughput_interval")):
            low, high = row["timing"][ends]
            assert 0 < low <= row["timing"][figure] <= high
        assert row["timing"]["peak_memory_bytes"] is None
    assert "pictures a second" in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_px": 17}, "expected at most 16, the side of the teacher's pictures"),
        (
            {"metrics": ("fid", "lpips"), "perceptual": PerceptualConfig(distance="lpips-efficientnet-lite0")},
            "perceptual.size_px: 16 px are too few for lpips-efficientnet-lite0",
        ),
        ({"metrics": ("fid", "density_coverage")}, "density_coverage of 10 samples and 5 real images; expected at least 6"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_sampling(
    chain: Chain, tmp_path: Path, changes: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.evaluate.row_sets.sample_row", lambda *_: pytest.fail("sampled"))
    with pytest.raises(BadInput, match=message):
        run(CONFIG.model_copy(update=changes), Inputs.model_validate(chain.inputs()), make_workspace(tmp_path, chain.store, identity="bad"))


def test_a_patch_is_the_middle_and_a_small_picture_has_none() -> None:
    picture = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    assert np.array_equal(centre_patch(picture, 4), picture[1:5, 2:6])
    assert np.array_equal(centre_patch(picture, 6), picture[:, 1:7])
    with pytest.raises(BadInput, match="6 x 8 px has no patch of 7 px"):
        centre_patch(picture, 7)


def test_the_interval_of_a_median_is_the_bootstraps() -> None:
    """Of three repeats a resample's median is the smallest where two or three of the draws are: with probability 7 / 27."""
    measured = np.array([1.0, 2.0, 10.0])
    wide = CONFIG.model_copy(update={"resamples": 20_000, "confidence": 1 - 2 * 0.27})
    assert interval_of_median(measured, wide, 0) == (2.0, 2.0)
    assert interval_of_median(measured, wide.model_copy(update={"confidence": 1 - 2 * 0.25}), 0) == (1.0, 10.0)
    assert interval_of_median(np.array([3.0]), CONFIG, 0) == (3.0, 3.0)


# Real images from elsewhere


def test_a_reference_set_is_made_once_and_takes_the_place_of_the_selection(chain: Chain, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    pictures = [random.integers(0, 256, (20, 30, 3), dtype=np.uint8) for _ in range(7)]
    (tmp_path / "coco" / "deeper").mkdir(parents=True)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "coco" / ("deeper" if number == 6 else "") / f"{number}.png")
    outside = {"reference": str(tmp_path / "coco")}
    looks = CONFIG.reference_config()
    made = reference.run(looks, reference.Inputs(), make_workspace(tmp_path, chain.store, identity="coco", outside=outside))
    assert made.content.images == 7
    extractor = extractor_spec("efficientnet-lite0").build("cpu")
    sets = reference.read_reference(made, looks, make_workspace(tmp_path, chain.store))
    assert np.array_equal(sets["whole"].features, features_of(pictures, extractor, "cpu")), "whole pictures of their own size"
    assert np.array_equal(sets["patch"].features, features_of([picture[4:16, 9:21] for picture in pictures], extractor, "cpu"))

    config = CONFIG.model_copy(update={"metrics": ("fid",), "timing": None, "teacher_steps": (1,)})
    inputs = Inputs.model_validate(chain.inputs() | {"reference": made})
    manifest = run(config, inputs, make_workspace(tmp_path, chain.store, identity="with"))
    folder = chain.store.fetch(manifest)
    own = FeatureStatistics.of(features_of(list(read_pictures(folder / "samples" / "teacher-at-1")), extractor, "cpu"))
    assert manifest.content.scores["teacher@1"]["fid_real"] == pytest.approx(frechet_distance(own, sets["whole"].statistics), rel=1e-6)
    report = json.loads((folder / "report.json").read_text())
    assert report["real_images"] == 7
    assert made.identity in {artifact["identity"] for artifact in report["lineage"]}
    with pytest.raises(BadInput, match="features of efficientnet-lite0; expected whole of inception"):
        reference.read_reference(
            made, looks.model_copy(update={"extractor": "inception", "patch_px": None}), make_workspace(tmp_path, chain.store)
        )


def test_a_folder_without_pictures_and_a_broken_one_are_clear_errors(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"evaluate.reference .*: holds 0 pictures; expected a folder of at least 2"):
        reference.picture_files(tmp_path)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"nothing")
    workspace = make_workspace(tmp_path, chain.store, identity="broken", outside={"reference": str(tmp_path)})
    with pytest.raises(BadInput, match=r"evaluate.reference .*a.png"):
        reference.run(CONFIG.reference_config(), reference.Inputs(), workspace)


def test_the_plan_has_a_reference_only_where_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "urls.csv").write_text("url,caption\nu,c\n")

    def names(**evaluate: object) -> dict[str, str]:
        place = str(tmp_path / "urls.csv")
        data = {"name": "r", "ingest": {"table": place}, "teacher": {"source": place}, "evaluate": evaluate}
        return dict(make_plan(parse_recipe(data), content_digest).identities)

    plain, named = names(), names(reference=str(tmp_path))
    assert set(named) - set(plain) == {"reference"}
    assert named["evaluate"] != plain["evaluate"]
    more = names(reference=str(tmp_path), prompt_count=5)
    assert more["reference"] == named["reference"], "one for all evaluations with these settings"
    assert names(reference=str(tmp_path), resize_px=9)["reference"] != named["reference"]
