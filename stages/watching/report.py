"""The report of a training: one HTML file that asks nothing of any server. Equal figures and pictures give equal bytes."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import yaml
from markupsafe import Markup
from PIL import Image

from schemas.base import Model
from schemas.manifest import FinetunedLoRA, Lineage, StudentContent, StudentLoRA, StudentUNet, Teacher
from schemas.training import TrainingConfig
from stages.reports.charts import Series, line_chart, swatch
from stages.reports.page import data_uri, grouped, page_environment, plural
from stages.training import Row
from stages.training.alarms import RollBack, roll_backs
from stages.training.metrics import columns, kept_rows, thinned
from stages.watching.look import FID, Seen, fid_column

_COLOURS: Final = 6
_SHOWN: Final = 12
"""Looks and lines of a chart by level that are shown at most, evenly chosen."""
_EXACT_BYTES: Final = 150_000
"""Larger strips are shown as WebP, so that a report stays below a few megabytes."""

_SHARES: Final = 24
"""Points of a line of shares: each is the mean of many batches, for of one a share of few samples says little."""

_LOOKS: Final = (1, 3, 4, 5, 0)
"""Colours of the lines of FID; that of the lowest is 2."""

_LATENTS: Final = {"x0": "student", "reference": "reference"}
_MOMENTS: Final = (("std", "Standard deviation"), ("mean", "Mean"))


@dataclass(frozen=True)
class Training:
    """One training and what it made."""

    content: StudentUNet | StudentLoRA | FinetunedLoRA | Teacher
    rows: Sequence[Row]
    """Every step's figures, in the order in which they happened."""
    config: TrainingConfig
    lineage: Lineage
    seen: Seen | None = None
    """Where it was looked at."""
    converted: Sequence[Row] = ()
    """Figures of a switch to x0 that went before."""


def render_report(training: Training) -> str:
    """Return the page."""
    config, lineage, seen = training.config, training.lineage, training.seen
    kept, alarms = kept_rows(training.rows), roll_backs(training.rows)
    marks = [float(alarm.step) for alarm in alarms]
    return (
        page_environment("stages.watching")
        .get_template("report.html.j2")
        .render(
            heading=_heading(training.content),
            says=_says(training.content),
            node=lineage.node,
            training_steps=config.training_steps,
            batch_size=config.batch_size,
            tiles=_tiles(kept, alarms, seen),
            alarms=alarms,
            sections=[section for section in _sections(kept, marks, seen, training.converted) if section["charts"]],
            looks=None if seen is None else _looks(seen),
            inputs=sorted(lineage.inputs.items()),
            config=yaml.safe_dump({lineage.stage: config.identity_fields()}, sort_keys=False, allow_unicode=True),
        )
    )


def _heading(content: Model) -> str:
    if isinstance(content, StudentContent):
        return f"A student of {', '.join(map(str, content.steps))} {'step' if content.steps == (1,) else 'steps'}"
    return "A style" if isinstance(content, FinetunedLoRA) else "Another base"


def _says(content: StudentContent | FinetunedLoRA | Teacher) -> str:
    network = f"LoRA of rank {content.rank}" if isinstance(content, StudentLoRA | FinetunedLoRA) else "whole UNet"
    if isinstance(content, FinetunedLoRA):
        return f"{network}, of {plural(content.samples, 'picture')}"
    method = f"{content.method}, " if isinstance(content, StudentContent) else ""
    return f"{method}{network}, says {content.prediction_type}"


def _tiles(kept: Sequence[Row], alarms: Sequence[RollBack], seen: Seen | None) -> list[dict[str, str]]:
    last = kept[-1]
    tiles = [{"label": "steps", "value": grouped(int(last["step"])), "note": plural(len(alarms), "roll-back") if alarms else "no alarm"}]
    if seen is not None:
        tiles.append(
            {"label": "FID to teacher, last", "value": _figure(last[FID]), "note": _whose(seen, "last", plural(len(seen.strips), "look"))}
        )
        tiles.append(
            {
                "label": "FID to teacher, lowest",
                "value": _figure(seen.best_fid),
                "note": _whose(seen, "best", f"step {grouped(seen.best_step)}"),
            }
        )
    if "student.loss" in last:
        tiles.append({"label": "student's loss", "value": _figure(last["student.loss"]), "note": "last step"})
    if last.get("student.reference_std"):
        ratio = last["student.x0_std"] / last["student.reference_std"]
        tiles.append({"label": "deviation of latents", "value": _figure(ratio), "note": "student's to the reference's"})
    return tiles


def _whose(seen: Seen, which: str, note: str) -> str:
    return f"{note}; the student's weights" if which == seen.keep else note


def _sections(kept: Sequence[Row], marks: Sequence[float], seen: Seen | None, converted: Sequence[Row]) -> list[dict[str, Any]]:
    names = columns(kept)
    losses = {name: name.partition(".")[0] for name in names if name.endswith(".loss")}
    norms = {name: name.partition(".")[0] for name in names if name.endswith(".grad_norm")}
    rates = {name: name.partition(".")[0] for name in names if name.endswith(".learning_rate")}
    accuracy = {name: which for which in ("real", "fake") for name in names if name.endswith(f".{which}_accuracy")}
    quality, bias = _fid(kept, marks, seen), "" if seen is None else seen.bias
    return [
        {"title": "Quality on the way", "says": f"FID to the teacher, of one run: it ranks its steps and nothing else. {bias}",
         "charts": [quality] if quality else []},
        {"title": "Before", "says": "Before all that follows the student learned by squared error: to say x0, or for dmd the outputs of pairs.",
         "charts": _before(kept_rows(converted))},
        {"title": "Losses", "says": "Medians of short stretches of steps.",
         "charts": [chart for name, player in losses.items() if (chart := _chart(
             kept, {name: player}, f"Loss of the {player}", "loss", marks=marks))]},
        {"title": "The discriminator",
         "says": "Share of samples that it takes for what they are, by the noise level at which they are judged; 0.5 is a coin, 1 leaves the student "
                 "nothing to learn from.",
         "charts": [chart for chart in (
             _shares(kept, accuracy, "Accuracy, all levels", marks),
             _shares(kept, _levels(names, "real"), "Real ones, by level", marks),
             _shares(kept, _levels(names, "fake"), "The student's, by level", marks)) if chart]},
        {"title": "Latents",
         "says": "The student's x0 and its reference of the same batch: what a perfect student would say, for lcm and finetune encoded pictures, for "
                 "dmd these or the teacher's outputs of the pairs.",
         "charts": [chart for what, title in _MOMENTS if (chart := _latents(kept, what, title, marks))]},
        {"title": "Optimisers", "says": "Norm of all gradients of a player before clipping, and its learning rate.",
         "charts": [chart for chart in (
             _chart(kept, norms, "Norm of the gradients", "L2 norm", marks=marks, log=True),
             _chart(kept, rates, "Learning rate", "rate", marks=marks)) if chart]},
    ]  # fmt: skip


def _before(kept: Sequence[Row]) -> list[dict[str, Any]]:
    """All figures of what the student learned first."""
    charts = [_chart(kept, {"student.loss": "student"}, "Loss of the first part", "loss", marks=[])]
    charts += [_latents(kept, what, f"{title} of the first part", []) for what, title in _MOMENTS]
    charts.append(_chart(kept, {"student.grad_norm": "student"}, "Norm of the gradients, first part", "L2 norm", marks=[], log=True))
    charts.append(_chart(kept, {"student.learning_rate": "student"}, "Learning rate, first part", "rate", marks=[]))
    return [chart for chart in charts if chart]


def _latents(kept: Sequence[Row], what: str, title: str, marks: Sequence[float]) -> dict[str, Any] | None:
    named = {f"student.{name}_{what}": label for name, label in _LATENTS.items()}
    return _chart(kept, named, title, title.lower(), marks=marks)


def _levels(names: Sequence[str], which: str) -> dict[str, str]:
    prefix = f"discriminator.{which}_accuracy_at_"
    found = [name for name in names if name.startswith(prefix)]
    return {name: name.removeprefix(prefix) for name in _evenly(found, _COLOURS)}


def _chart(
    kept: Sequence[Row], named: Mapping[str, str], title: str, y_label: str, *, marks: Sequence[float],
    log: bool = False, points: int = 120, statistic: Callable[..., Any] = np.median,
) -> dict[str, Any] | None:  # fmt: skip
    """Figures over the steps, by their label. None where there are none."""
    lines = [(label, thinned(kept, name, points, statistic)) for name, label in named.items()]
    series = [Series(label, line, 1 + number % (_COLOURS - 1), markers=False) for number, (label, line) in enumerate(lines) if line]
    if not series:
        return None
    log = log and all(y > 0 for line in series for _, y in line.points)
    svg = line_chart(series, title=title, x_label="optimiser step", y_label=y_label, log_y=log, marks=marks)
    legend = [(line.label, swatch(line.slot)) for line in series] if len(series) > 1 else []
    return {"title": title, "svg": svg, "legend": legend}


def _shares(kept: Sequence[Row], named: Mapping[str, str], title: str, marks: Sequence[float]) -> dict[str, Any] | None:
    return _chart(kept, named, title, "share", marks=marks, points=_SHARES, statistic=np.mean)


def _fid(kept: Sequence[Row], marks: Sequence[float], seen: Seen | None) -> dict[str, Any] | None:
    if seen is None:
        return None
    several = len(seen.steps) > 1
    named = {FID: "mean of all" if several else "student"} | {fid_column(steps): plural(steps, "step") for steps in seen.steps if several}
    lines = [(label, tuple((row["step"], row[name]) for row in kept if name in row)) for name, label in named.items()]
    series = [Series(label, points, _LOOKS[number % len(_LOOKS)]) for number, (label, points) in enumerate(lines) if points]
    whose = "the student's weights" if seen.keep == "best" else "the weights in best/"
    series.append(Series(f"lowest: {whose}", ((float(seen.best_step), seen.best_fid),), 2))
    svg: Markup = line_chart(series, title="FID to the teacher", x_label="optimiser step", y_label="FID, lower is better", marks=marks)
    return {"title": "FID to the teacher", "svg": svg, "legend": [(line.label, swatch(line.slot)) for line in series]}


def _looks(seen: Seen) -> dict[str, Any]:
    steps = sorted({*_evenly(list(seen.strips), _SHOWN), seen.best_step} & set(seen.strips))
    lines: list[dict[str, Any]] = [{"label": "teacher", "note": "", "uri": _uri(seen.teacher), "lines": 1}]
    lines += [
        {
            "label": f"step {grouped(step)}",
            "note": "lowest FID" if step == seen.best_step else "",
            "uri": _uri(seen.strips[step]),
            "lines": len(seen.steps),
        }
        for step in steps
    ]
    return {"captions": seen.captions, "counts": seen.steps, "lines": lines, "left_out": len(seen.strips) - len(steps)}


def _evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


def _uri(png: bytes) -> str:
    if len(png) <= _EXACT_BYTES:
        return data_uri(png, "png")
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).save(buffer, "WEBP", quality=86, method=6)
    return data_uri(buffer.getvalue(), "webp")


def _figure(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else grouped(round(value))
