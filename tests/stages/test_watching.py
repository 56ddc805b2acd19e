"""Looks at a student in training, and what of a training is kept in its artifact."""

import html
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from schemas.dmd import DmdConfig
from schemas.errors import BadInput
from schemas.lcm import LcmConfig
from schemas.lightning import LightningConfig, LinkConfig
from schemas.manifest import Latents, Manifest, Teacher
from schemas.recipe import Recipe
from stages import lcm, lightning
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.sampling import draw_noise, image_generator, make_scheduler, sample
from stages.evaluate.feature_network import features_of
from stages.evaluate.features import extractor_spec
from stages.evaluate.fid import FeatureStatistics, frechet_distance
from stages.publish.card import _training as card_training
from stages.students import load_student, weight_files
from stages.training import Row
from stages.training.data import indices
from stages.training.events import EVENTS_FILE, write_events
from stages.training.metrics import kept_rows, read_metrics
from stages.training.randomness import derive_seed
from stages.watching import artifact
from stages.watching.look import StudentWatch, strip
from stages.watching.report import Training, render_report
from stages.workspace import Workspace
from tests.training import artifacts
from tests.training.mortal import Killed, Mortal

Place = tuple[Path, Manifest[Teacher], Manifest[Latents]]

WATCH = {"every": 3, "images": 4, "teacher_steps": 4, "extractor": "efficientnet-lite0", "grid_images": 2, "batch_size": 3}


def link(**more: object) -> LinkConfig:
    known: dict[str, object] = {"teacher_steps": 4, "steps": 2, "training_steps": 7, "batch_size": 4, "checkpoint_every": 2}
    known |= {"optimizer": {"learning_rate": 1e-2}, "watch": WATCH, "ema_decay": 0.5}
    return LinkConfig.model_validate(known | more)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("watching")
    teacher = artifacts.make_teacher(folder, "sdxl")
    return folder, teacher, artifacts.make_latents(folder, teacher)


def run_link(place: Place, config: LinkConfig, workspace: Workspace | None = None) -> Manifest[Any]:
    folder, teacher, latents = place
    return lightning.run(
        config, lightning.Inputs(teacher=teacher, latents=latents), workspace or artifacts.workspace(folder, config=config)
    )


@pytest.fixture(scope="module")
def watched(place: Place) -> Manifest[Any]:
    return run_link(place, link())


def test_looks_leave_pictures_figures_and_the_best_weights(place: Place, watched: Manifest[Any]) -> None:
    files = artifacts.open_store(place[0]).fetch(watched)
    rows = read_metrics(files / "metrics.parquet")
    fids = {int(row["step"]): row["student.fid_teacher"] for row in rows if "student.fid_teacher" in row}
    assert sorted(fids) == [3, 6, 7], "at intervals, and at the end"
    content = watched.content
    assert (content.best_step, content.best_fid) == min(fids.items(), key=lambda item: item[1])
    names = {path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file()}
    assert names == {
        *(f"{folder}unet/{name}" for folder in ("", "best/") for name in ("config.json", "diffusion_pytorch_model.safetensors")),
        *(f"grids/{name}.png" for name in ("teacher", "step-000003", "step-000006", "step-000007")),
        *("metrics.parquet", "report.html", f"tensorboard/{EVENTS_FILE}"),
    }
    weights = [load_file(files / folder / "unet/diffusion_pytorch_model.safetensors") for folder in ("", "best")]
    assert weights[0].keys() == weights[1].keys()
    same = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert same == (content.best_step == 7)
    assert sorted(weight_files(watched)) == ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]


def test_the_last_look_is_at_what_is_published(place: Place, watched: Manifest[Any]) -> None:
    """The published weights, the average of the training, sampled anew by diffusers' scheduler on the same captions and noise."""
    folder, teacher, _ = place
    store = artifacts.open_store(folder)
    files = store.fetch(watched)
    pipeline = TeacherPipeline.load(store.fetch(teacher))
    seed = derive_seed(3, "watch")
    captions = [artifacts.CAPTIONS[index] for index in indices(seed, 0, 4, len(artifacts.CAPTIONS))]
    latent = sample(
        load_student(pipeline, watched, files),
        draw_noise([image_generator(seed, index) for index in range(4)], pipeline.latent_shape),
        pipeline.conditioning(captions),
        scheduler=make_scheduler("trailing", pipeline.scheduler_config, "epsilon"),
        steps=2,
    )
    pictures = (pipeline.decode(latent).permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    drawn = Image.open(files / "grids" / "step-000007.png")
    difference = np.abs(np.asarray(drawn).astype(int) - np.asarray(Image.open(io.BytesIO(strip(list(pictures[:2]))))))
    assert difference.max() <= 2, "memory layouts differ in the last bit"
    extractor = extractor_spec("efficientnet-lite0").build("cpu")
    own = FeatureStatistics.of(features_of(list(pictures), extractor, "cpu"))
    last = read_metrics(files / "metrics.parquet")[-1]["student.fid_teacher"]
    assert frechet_distance(own, own) < 1e-6 < last
    page = (files / "report.html").read_text(encoding="utf-8")
    assert "FID of 4 images with 1280 features means nothing by itself" in page
    assert re.search(r"Two halves of the teacher(&#39;|')s own samples, 2 each, are at FID [\d.]+, and are of one model", page)


def test_killed_between_looks_it_ends_with_the_same_files(place: Place, watched: Manifest[Any], tmp_path: Path) -> None:
    folder = tmp_path
    (folder / "store").mkdir()
    for name in ("blobs", "artifacts", "files"):
        if (place[0] / "store" / name).exists():
            (folder / "store" / name).symlink_to(place[0] / "store" / name)
    config = link()
    given = artifacts.workspace(folder, config=config, seed=3)
    given = Workspace(**{**vars(given), "identity": "cd" * 32})
    deaths = 0
    while deaths < 20:
        try:
            again = run_link((folder, *place[1:]), config, Mortal.of(given, 5))
        except Killed:
            deaths += 1
        else:
            assert deaths >= 2
            assert again.files == watched.files
            return
    pytest.fail("it never ended")


def test_looks_change_nothing_of_the_training(place: Place, watched: Manifest[Any]) -> None:
    plain = run_link(place, link(watch=None))
    assert plain.content.best_step is None
    by_path = [{entry.path: entry.sha256 for entry in made.files} for made in (plain, watched)]
    assert {"unet/diffusion_pytorch_model.safetensors", "report.html", "metrics.parquet"} <= by_path[0].keys()
    assert not any(path.startswith(("grids", "best")) for path in by_path[0])
    name = "unet/diffusion_pytorch_model.safetensors"
    assert by_path[0][name] == by_path[1][name]


def test_lcm_is_looked_at_with_its_own_sampler(place: Place) -> None:
    folder, teacher, latents = place
    config = LcmConfig.model_validate(
        {"training_steps": 2, "batch_size": 2, "warmup_steps": 0, "lora_rank": 2, "lora_alpha": 2, "steps": (2, 1), "watch": WATCH}
    )
    made = lcm.run(config, lcm.Inputs(teacher=teacher, latents=latents), artifacts.workspace(folder, config=config))
    files = artifacts.open_store(folder).fetch(made)
    assert {"best/pytorch_lora_weights.safetensors", "grids/step-000002.png", "report.html"} <= {entry.path for entry in made.files}
    assert made.content.best_step == 2
    lora = "pytorch_lora_weights.safetensors"
    assert (files / lora).read_bytes() == (files / "best" / lora).read_bytes()
    look = read_metrics(files / "metrics.parquet")[-1]
    by_steps = [look[f"student.fid_teacher_at_{steps}"] for steps in (2, 1)]
    assert look["student.fid_teacher"] == pytest.approx(sum(by_steps) / 2, abs=1e-5)
    assert by_steps[0] != by_steps[1]
    shape = {name: Image.open(files / f"grids/{name}.png").size for name in ("teacher", "step-000002")}
    assert shape["teacher"][0] == shape["step-000002"][0]
    assert shape["step-000002"][1] > 2 * shape["teacher"][1], "a line for each step count"
    page = (files / "report.html").read_text(encoding="utf-8")
    for said in ("mean of all", "</svg>2 steps", "</svg>1 step", "From above in 2, 1 steps"):
        assert said in page, said


def test_looks_at_chosen_step_counts(place: Place) -> None:
    known = {"training_steps": 1, "batch_size": 2, "warmup_steps": 0, "lora_rank": 2, "lora_alpha": 2, "steps": (2, 1)}
    config = LcmConfig.model_validate(known | {"watch": WATCH | {"steps": (1,)}})
    folder, teacher, latents = place
    made = lcm.run(config, lcm.Inputs(teacher=teacher, latents=latents), artifacts.workspace(folder, config=config))
    look = read_metrics(artifacts.open_store(folder).fetch(made) / "metrics.parquet")[-1]
    assert [name for name in look if "fid_teacher" in name] == ["student.fid_teacher"]
    with pytest.raises(ValueError, match=r"expected some of the student's step counts \[2, 1\]"):
        LcmConfig.model_validate(known | {"watch": WATCH | {"steps": (4, 1)}})
    with pytest.raises(ValueError, match="the student of each link has one step count"):
        LightningConfig.model_validate({"watch": WATCH | {"steps": (4,)}})
    with pytest.raises(ValueError, match=r"expected some of the student's step counts \[1\]"):
        DmdConfig.model_validate({"watch": WATCH | {"steps": (4,)}})


def test_where_the_best_is_kept_it_is_the_student(place: Place, watched: Manifest[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same training: what was kept beside the last is now read as the student, and the last lies beside it."""
    plain = artifacts.open_store(place[0]).fetch(watched)
    rows = read_metrics(plain / "metrics.parquet")
    fids = {int(row["step"]): row["student.fid_teacher"] for row in rows if "student.fid_teacher" in row}
    falling = dict(zip(sorted(fids), (1.0, 2.0, 3.0), strict=True))  # quality falls with training
    measured = iter([*falling.values(), 4.0])
    monkeypatch.setattr(StudentWatch, "_fid", lambda *_: next(measured))
    made = run_link(place, link(watch=WATCH | {"keep": "best"}))
    files = artifacts.open_store(place[0]).fetch(made)
    assert (made.content.kept, made.content.best_step, made.content.weights_step) == ("best", 3, 3)
    assert (watched.content.kept, watched.content.weights_step) == ("last", 7)
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (files / "last" / name).read_bytes() == (plain / name).read_bytes()
    assert not (files / "best").exists()
    assert sorted(weight_files(made)) == ["unet/config.json", name]

    read = artifacts.open_store(place[0]).fetch(made, weight_files(made))
    loaded = load_student(TeacherPipeline.load(artifacts.open_store(place[0]).fetch(place[1])), made, read).unet.state_dict()
    early = run_link(place, link(training_steps=3))  # the third step's weights: the rate is constant
    assert all(torch.equal(loaded[key], tensor) for key, tensor in load_file(artifacts.open_store(place[0]).fetch(early) / name).items())
    assert any(not torch.equal(loaded[key], tensor) for key, tensor in load_file(plain / name).items())

    page = (files / "report.html").read_text(encoding="utf-8")
    assert "step 3; the student&#39;s weights" in page
    assert "lowest: the student&#39;s weights" in page or "lowest: the student's weights" in page
    assert card_training(made.content) == "3, the best of 7"
    assert card_training(watched.content) == "7"


def test_an_extractor_that_is_not_installed_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    recipe = Recipe.model_construct()
    with pytest.raises(BadInput, match=r"lightning\.watch\.extractor efficientnet-lite0: .* not installed"):
        lightning.preflight(link(), {}, recipe)
    lightning.preflight(link(watch=None), {}, recipe)


ROWS: list[Row] = [
    *({"step": step, "student.loss": 1 / step, "discriminator.real_accuracy_at_249": 0.5} for step in range(1, 5)),
    {"step": 5, "student.loss": 9.0, "alarm.saturated": 1.0},
    *({"step": step, "student.loss": 2 / step, "student.learning_rate": 1e-4} for step in range(4, 9)),
]


def test_tensorboard_reads_the_figures_that_led_to_the_result(tmp_path: Path) -> None:
    read_back = [dict(reversed(row.items())) for row in ROWS]  # another order of the same figures
    for name, rows in (("one", ROWS), ("two", read_back)):
        write_events(rows, {"student/samples": {8: strip([np.zeros((4, 6, 3), np.uint8)])}}, tmp_path / name / EVENTS_FILE)
    assert (tmp_path / "one" / EVENTS_FILE).read_bytes() == (tmp_path / "two" / EVENTS_FILE).read_bytes()
    read = EventAccumulator(str(tmp_path / "one")).Reload()
    found = [(event.step, event.value) for event in read.Scalars("student/loss")]
    assert found == [(int(row["step"]), pytest.approx(row["student.loss"])) for row in kept_rows(ROWS)]
    assert [step for step, _ in found] == list(range(1, 9))
    assert [event.step for event in read.Images("student/samples")] == [8]
    assert "discriminator/real_accuracy_at_249" in read.Tags()["scalars"]


CONVERTED: list[Row] = [
    {"step": step, "student.loss": 4 / step, "student.grad_norm": 2.0 / step, "student.learning_rate": 3e-4}
    | {"student.x0_mean": 0.1, "student.x0_std": 0.9, "student.reference_mean": 0.0, "student.reference_std": 1.0}
    for step in range(1, 12)
]


def test_the_conversion_has_its_own_tags_and_charts(place: Place, watched: Manifest[Any], tmp_path: Path) -> None:
    """All figures of the training that went before, beside those of the same steps after it."""
    artifact.save_report(tmp_path, Training(watched.content, ROWS, link(), watched.lineage, converted=CONVERTED))
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in CONVERTED[0].keys() - {"step"}:
        found = [(event.step, event.value) for event in read.Scalars(f"conversion/{name}")]
        assert found == [(int(row["step"]), pytest.approx(row[name])) for row in CONVERTED], name
    assert [event.step for event in read.Scalars("student/loss")] == list(range(1, 9))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for said in ("Loss of", "Standard deviation of", "Mean of"):
        assert f"<h3>{said} the first part</h3>" in page
    assert "<h3>Norm of the gradients, first part</h3>" in page and "<h3>Learning rate, first part</h3>" in page


def test_live_figures_go_where_the_installation_says(place: Place, tmp_path: Path) -> None:
    config = link(watch=None, training_steps=3)
    workspace = artifacts.workspace(place[0], config=config)
    run_link(place, config, Workspace(**{**vars(workspace), "tensorboard": tmp_path}))
    (run,) = tmp_path.iterdir()
    read = EventAccumulator(str(run / "checkpoint")).Reload()
    assert [event.step for event in read.Scalars("student/loss")] == [1, 2, 3]


def test_the_report_asks_nothing_of_a_server_and_marks_alarms(place: Place, watched: Manifest[Any]) -> None:
    page = (artifacts.open_store(place[0]).fetch(watched) / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert page.count("data:image/png;base64") == 4, "the teacher's strip and three looks"
    for said in ("Standard deviation", "Norm of the gradients", "FID to the teacher", "lowest FID", "teacher_steps: 4"):
        assert said in page
    assert page == render_again(place, watched)
    assert 'class="threshold"' not in page
    marked = render_report(Training(watched.content, ROWS, link(), watched.lineage))
    assert "Step 5: alarm <code>saturated</code>. Training went back to step 3" in marked
    assert 'class="threshold"' in marked
    assert "nan" not in marked.lower().replace("finance", "")


def render_again(place: Place, made: Manifest[Any]) -> str:
    """The page from the artifact's own files."""
    from stages.watching.look import Seen

    files = artifacts.open_store(place[0]).fetch(made)
    seed = derive_seed(3, "watch")
    captions = tuple(artifacts.CAPTIONS[index] for index in indices(seed, 0, 4, len(artifacts.CAPTIONS)))[:2]
    strips = {step: (files / f"grids/step-{step:06d}.png").read_bytes() for step in (3, 6, 7)}
    teacher = (files / "grids/teacher.png").read_bytes()
    # of the reference's features, which are no file of the artifact
    bias = re.search(
        r"FID of 4 images with \d+ features means nothing by itself.*?of one model\.", (files / "report.html").read_text("utf-8")
    )
    assert bias is not None
    seen = Seen("last", made.content.best_step, made.content.best_fid, {}, captions, strips, teacher, (2,), html.unescape(bias[0]))
    return render_report(Training(made.content, read_metrics(files / "metrics.parquet"), link(), made.lineage, seen))
