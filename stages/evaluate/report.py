"""The report: one HTML file that asks nothing of any server, the same bytes for the same figures."""

import io
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from markupsafe import Markup
from PIL import Image

from stages.evaluate.curves import TrainingCurves
from stages.evaluate.grid import Group, Pixels, thumbnail
from stages.evaluate.metrics.catalogue import METRICS
from stages.evaluate.published import Published, published_beside
from stages.evaluate.summary import figure
from stages.reports.chain import chain_part
from stages.reports.charts import Series, line_chart, swatch
from stages.reports.page import data_uri, funnel, page_environment, page_script, plural

_COLOURS = 6
_HEADLINE = ("fid_teacher", "fid_real")
"""Metrics that are drawn against latency too."""
_EXACT_PX = 128
_START_STEPS = 4


@dataclass(frozen=True)
class GridPictures:
    """What the grid shows."""

    prompts: tuple[str, ...]
    groups: tuple[Group, ...]
    pictures: Sequence[Sequence[Sequence[Pixels]]]
    """`[group][column][prompt]`, RGB (H, W, 3)."""


def render_report(
    summary: Mapping[str, Any], grid: GridPictures, transferred: Mapping[str, GridPictures], curves: Mapping[str, TrainingCurves]
) -> str:
    """Return the page. `summary` is what `report.json` holds; `transferred` are by entry of `evaluate.transfer`, `curves` by student."""
    environment = page_environment("stages.evaluate")
    environment.filters |= {"figure": figure}
    families = list(dict.fromkeys(row["family"] for row in summary["rows"]))
    published = published_beside(summary["config"].get("protocol"))
    slots = {family: number % _COLOURS for number, family in enumerate(families)}
    return environment.get_template("report.html.j2").render(
        summary=summary,
        reference=summary["rows"][0],
        students=len({row["model"] for row in summary["rows"]} - {"teacher"}),
        legend=[(family, swatch(slots[family])) for family in families],
        tables=[_table(summary, metric, title, slots, published) for metric, title in summary["metrics"].items()],
        charts=[_quality(summary, metric, title, families, slots) for metric, title in summary["metrics"].items()],
        timings=_timings(summary),
        latencies=[
            _latency(summary, metric, title, families, slots) for metric, title in summary["metrics"].items() if metric in _HEADLINE
        ],
        published=[paper for paper in published if any(paper.of(metric) for metric in summary["metrics"])],
        transfers=[_transfer(entry) | {"grid": _grid(transferred[entry["name"]])} for entry in summary.get("transfers", ())],
        tiles=_tiles(summary),
        grid=_grid(grid),
        script=page_script("stages.evaluate", "samples.js"),
        curves=[(name, _curve(name, training), training.alarms) for name, training in curves.items() if training.losses],
        funnel=funnel(summary["funnel"]),
        chain=chain_part(summary["lineage"]),
        config=yaml.safe_dump({"evaluate": summary["config"]}, sort_keys=False, allow_unicode=True),
    )


def _tiles(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures at the head of the page: for each step count of a student its best FID to the teacher, beside the teacher's own."""
    reference = summary["rows"][0]
    teacher = {row["steps"]: row["scores"]["fid_teacher"] for row in summary["rows"] if row["model"] == "teacher"}
    students = [row for row in summary["rows"] if row["model"] != "teacher"]
    tiles = []
    for steps in sorted({row["steps"] for row in students if row["steps"] < reference["steps"]}, reverse=True)[-4:]:
        best = min((row for row in students if row["steps"] == steps), key=lambda row: (row["scores"]["fid_teacher"], row["name"]))
        note = f"teacher {figure(teacher[steps])}" if steps in teacher else ""
        tiles.append({"label": plural(steps, "step"), "value": figure(best["scores"]["fid_teacher"]), "who": best["family"], "note": note})
    return tiles


def _table(summary: Mapping[str, Any], metric: str, title: str, slots: Mapping[str, int], published: Sequence[Published]) -> dict[str, Any]:
    """One metric: a line a family, a column a step count, with intervals; the best of each column is marked. Below, what papers published."""
    figures = {(row["family"], row["steps"]): (row["scores"][metric], row["intervals"][metric]) for row in summary["rows"]}
    papers = [(paper, paper.of(metric)) for paper in published if paper.of(metric)]
    theirs = {steps for _, models in papers for by_steps in models.values() for steps in by_steps}
    steps, lines = _lines(figures, max if METRICS[metric].higher_is_better else min, theirs)
    return {
        "title": title,
        "steps": steps,
        "lines": [line | {"swatch": swatch(slots[line["family"]])} for line in lines],
        "published": [
            {"title": paper.title, "lines": [(model, [of_model.get(count, "") for count in steps]) for model, of_model in models.items()]}
            for paper, models in papers
        ],
    }


def _transfer(entry: Mapping[str, Any]) -> dict[str, Any]:
    """One changed teacher: a line a family, the teacher itself first, a column a step count."""
    steps, lines = _lines({(row["family"], row["steps"]): (row["fid_teacher"], row["interval"]) for row in entry["rows"]}, better=min)
    return {"name": entry["name"], "changed": entry["changed"], "steps": steps, "lines": lines, "published": []}


def _lines(
    figures: Mapping[tuple[str, int], tuple[float, Sequence[float]]],
    better: Callable[[Iterable[float]], float],
    others: Collection[int] = (),
) -> tuple[list[int], list[dict[str, Any]]]:
    """Step counts, descending, and a line a family of what each cell shows; `figures` with their intervals by family and step count; `others`
    are step counts that have a column too."""
    steps = sorted({count for _, count in figures} | set(others), reverse=True)
    rivals = {count: [value for (_, own), (value, _) in figures.items() if own == count] for count in steps}
    best = {count: better(values) for count, values in rivals.items() if len(values) > 1}
    empty = {"text": "", "range": [], "best": False}
    lines = []
    for family in dict.fromkeys(family for family, _ in figures):
        cells = []
        for count in steps:
            if (family, count) not in figures:
                cells.append(empty)
                continue
            value, interval = figures[family, count]
            cells.append({"text": figure(value), "range": [figure(end) for end in interval], "best": value == best.get(count)})
        lines.append({"family": family, "cells": cells})
    return steps, lines


def _timings(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Latency, throughput and memory, a line a row; none where nothing was timed."""
    return [
        {
            "family": row["family"],
            "steps": str(row["steps"]),
            "latency": f"{timing['latency_seconds']:.3g}",
            "latency_range": _range(timing["latency_interval"]),
            "throughput": f"{timing['images_per_second']:.3g}",
            "throughput_range": _range(timing["throughput_interval"]),
            "batch": str(timing["batch_size"]),
            "memory": "" if timing["peak_memory_bytes"] is None else f"{timing['peak_memory_bytes'] / 2**30:.2f}",
            "device": timing["device"],
        }
        for row in summary["rows"]
        if (timing := row.get("timing")) is not None
    ]


def _range(ends: Sequence[float]) -> str:
    return "–".join(f"{end:.3g}" for end in ends)


def _quality(summary: Mapping[str, Any], metric: str, title: str, families: Sequence[str], slots: Mapping[str, int]) -> dict[str, Any]:
    """A metric against steps."""
    points = {
        family: [(float(row["steps"]), row["scores"][metric]) for row in summary["rows"] if row["family"] == family] for family in families
    }
    return _metric_chart(metric, title, points, slots, "sampling steps", falling_x=True)


def _latency(summary: Mapping[str, Any], metric: str, title: str, families: Sequence[str], slots: Mapping[str, int]) -> dict[str, Any]:
    """A metric against the seconds that one picture takes, of the rows that were timed."""
    timed = [row for row in summary["rows"] if row.get("timing") is not None]
    points = {
        family: [(row["timing"]["latency_seconds"], row["scores"][metric]) for row in timed if row["family"] == family]
        for family in families
    }
    return _metric_chart(metric, title, points, slots, "seconds, one picture", round_x=True)


def _metric_chart(
    metric: str,
    title: str,
    points: Mapping[str, Sequence[tuple[float, float]]],
    slots: Mapping[str, int],
    x_label: str,
    *,
    round_x: bool = False,
    falling_x: bool = False,
) -> dict[str, Any]:
    about = METRICS[metric]
    log = about.unit.endswith("FID")  # positive, and over orders of magnitude
    series = [Series(family, tuple((x, y) for x, y in line if y > 0 or not log), slots[family]) for family, line in points.items()]
    better = "higher" if about.higher_is_better else "lower"
    chart = line_chart(
        series,
        title=title,
        x_label=x_label,
        y_label=f"{about.unit}, {better} is better",
        log_x=True,
        log_y=log,
        round_x=round_x,
        falling_x=falling_x,
    )
    return {"title": title, "svg": chart}


def _curve(name: str, training: TrainingCurves) -> Markup:
    curves = training.losses
    positive = all(value > 0 for curve in curves for _, value in curve.points)
    series = [Series(curve.name, curve.points, 1 + number % (_COLOURS - 1), markers=False) for number, curve in enumerate(curves)]
    return line_chart(
        series,
        title=f"{name}: loss",
        x_label="optimiser step",
        y_label=", ".join(curve.name for curve in curves),
        log_y=positive,
        marks=[float(alarm.step) for alarm in training.alarms],
    )


def _grid(grid: GridPictures) -> dict[str, Any]:
    """Columns of the table, and for the sliders the families, the teacher first, with their step counts."""
    steps: dict[str, list[int]] = {}
    for group in grid.groups:
        for row in group.rows:
            steps.setdefault(row.family, []).append(group.steps)
    numbers = {family: number for number, family in enumerate(steps)}
    columns = [
        {
            "family": row.family,
            "number": numbers[row.family],
            "steps": group.steps,
            "first": number == 0,
            "images": [picture_uri(picture) for picture in pictures],
        }
        for group, group_pictures in zip(grid.groups, grid.pictures, strict=True)
        for number, (row, pictures) in enumerate(zip(group.rows, group_pictures, strict=True))
    ]
    families = [
        {"name": family, "steps": counts, "start": 0 if number == 0 else _start(counts)}
        for number, (family, counts) in enumerate(steps.items())
    ]
    return {
        "prompts": grid.prompts,
        "groups": [(group.steps, len(group.rows)) for group in grid.groups],
        "columns": columns,
        "families": families,
    }


def _start(counts: Sequence[int]) -> int:
    """Where a student's slider stands at first, of falling step counts: at 4 or the next below, else at the fewest."""
    return next((number for number, count in enumerate(counts) if count <= _START_STEPS), len(counts) - 1)


def picture_uri(pixels: Pixels) -> str:
    """A picture as a data URI: small ones exact, as PNG; large ones as 256 px WebP, so that a report stays below a few megabytes."""
    buffer = io.BytesIO()
    if max(pixels.shape[:2]) <= _EXACT_PX:
        Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
        return data_uri(buffer.getvalue(), "png")
    thumbnail(pixels).save(buffer, "WEBP", quality=86, method=6)
    return data_uri(buffer.getvalue(), "webp")
