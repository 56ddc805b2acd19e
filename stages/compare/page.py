"""A comparison as one HTML file that asks nothing of any server, in the style of the evaluation's report."""

from typing import Any

from stages.compare.comparison import Comparison, Figure, Line
from stages.evaluate.summary import figure
from stages.reports.page import page_environment


def render_comparison(comparison: Comparison) -> str:
    """Return the page."""
    environment = page_environment("stages.compare")
    tables = [
        {"title": title, "lines": [_line(line, len(comparison.runs)) for line in comparison.of_metric(metric)]}
        for metric, title in comparison.titles.items()
    ]
    return environment.get_template("compare.html.j2").render(comparison=comparison, tables=[table for table in tables if table["lines"]])


def value_text(found: Figure | None) -> str:
    """A value as people read it; empty where there is none."""
    return "" if found is None else figure(found.value)


def range_text(found: Figure | None) -> str:
    """Its interval."""
    return "" if found is None or found.low is None or found.high is None else f"{figure(found.low)}–{figure(found.high)}"


def difference_text(line: Line, number: int) -> str:
    """A run's difference from the first, with its sign; empty where one has no such row."""
    difference = line.difference(number)
    return "" if difference is None else _signed(difference)


def apart(line: Line, number: int) -> bool | None:
    """Whether a run's row is told apart from the first's: by the interval of the difference where there is one, else by the intervals of the two."""
    paired = line.paired_interval(number)
    if paired is not None:
        return not paired[0] <= 0 <= paired[1]
    overlap = line.overlap(number)
    return None if overlap is None else not overlap


def apart_text(line: Line, number: int) -> str:
    """The same in words, with the interval of the difference."""
    paired, found = line.paired_interval(number), apart(line, number)
    if paired is not None:
        return f"{_signed(paired[0])} to {_signed(paired[1])}{', apart' if found else ''}"
    return {True: "apart", False: "overlap", None: ""}[found]


def _signed(value: float) -> str:
    text = figure(abs(value))
    return ("±" if float(text) == 0 else "+" if value > 0 else "−") + text


def _line(line: Line, runs: int) -> dict[str, Any]:
    return {
        "family": line.family,
        "steps": line.steps,
        "cells": [{"text": value_text(found), "range": range_text(found)} for found in line.figures],
        "differences": [
            {"text": difference_text(line, number), "apart": bool(apart(line, number)), "words": apart_text(line, number)}
            for number in range(1, runs)
        ],
    }
