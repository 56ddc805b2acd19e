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
    if difference is None:
        return ""
    text = figure(abs(difference))
    return ("±" if float(text) == 0 else "+" if difference > 0 else "−") + text


OVERLAP_TEXT = {True: "overlap", False: "apart", None: ""}
"""What is said of two intervals."""


def _line(line: Line, runs: int) -> dict[str, Any]:
    return {
        "family": line.family,
        "steps": line.steps,
        "cells": [{"text": value_text(found), "range": range_text(found)} for found in line.figures],
        "differences": [
            {"text": difference_text(line, number), "overlap": OVERLAP_TEXT[line.overlap(number)]} for number in range(1, runs)
        ],
    }
