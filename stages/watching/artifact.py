"""A student's artifact: its weights, and all that its training has told."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from schemas.manifest import Manifest, StudentLoRA, StudentUNet
from schemas.training import StudentTraining
from stages.diffusion.denoiser import UNetDenoiser
from stages.students import METRICS_FILE, Student, save_weights
from stages.training import Row, write_metrics
from stages.training.events import EVENTS_FILE, write_events
from stages.training.sharding import whole_network
from stages.watching.look import Seen, StudentWatch
from stages.watching.report import Training, render_report
from stages.workspace import Workspace

BEST_FOLDER = "best"
LAST_FOLDER = "last"
CONVERSION_FILE = "conversion.parquet"


def publish_student(
    student: Student,
    content: StudentUNet | StudentLoRA,
    rows: Sequence[Row],
    config: StudentTraining,
    workspace: Workspace,
    *,
    watch: StudentWatch | None,
    converted: Sequence[Row] = (),
) -> Manifest[Any]:
    """Publish the student as it is after training: weights, `metrics.parquet`, `report.html`, `tensorboard/`, and where its switch to x0 was
    trained first `conversion.parquet` with the figures (`converted`) of that.

    Where it was looked at: `grids/` with the pictures of every look too, and in `best/` the weights of the lowest FID, laid out as the last are; or
    where the recipe keeps the best, in `last/` the last. Afterwards the student's network holds the best. Of several processes the first publishes.
    """
    denoiser = student.denoiser
    assert isinstance(denoiser, UNetDenoiser)
    with workspace.folder("student") as folder:
        unet = whole_network(denoiser.unet, workspace.parallel)
        if workspace.parallel.leads:
            write_metrics(rows, folder / METRICS_FILE)
            if converted:
                write_metrics(converted, folder / CONVERSION_FILE)
            seen = None if watch is None else watch.seen(rows)
            if seen is None:
                save_weights(unet, folder, content)
            else:
                content = content.model_copy(update={"best_step": seen.best_step, "best_fid": seen.best_fid, "kept": seen.keep})
                _save_looks(seen, folder)
                last, best = (folder / LAST_FOLDER, folder) if seen.keep == "best" else (folder, folder / BEST_FOLDER)
                save_weights(unet, last, content)
                unknown = unet.load_state_dict(dict(seen.best), strict=False).unexpected_keys
                assert not unknown, unknown
                save_weights(unet, best, content)
            save_report(folder, Training(content, rows, config, workspace.lineage, seen, converted))
        return workspace.publish(folder, content)


def save_report(folder: Path, training: Training) -> None:
    """Write `report.html` and `tensorboard/` into an artifact's folder."""
    seen = training.seen
    pictures = {} if seen is None else {"student/samples": seen.strips, "teacher/samples": {0: seen.teacher}}
    write_events(training.rows, pictures, folder / "tensorboard" / EVENTS_FILE, training.converted)
    (folder / "report.html").write_text(render_report(training), encoding="utf-8")


def _save_looks(seen: Seen, folder: Path) -> None:
    grids = folder / "grids"
    grids.mkdir()
    (grids / "teacher.png").write_bytes(seen.teacher)
    for step, png in seen.strips.items():
        (grids / f"step-{step:06d}.png").write_bytes(png)
