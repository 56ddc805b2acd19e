"""The command that puts evaluated runs side by side: `compare`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.table import Table

from flows.cli.console import output
from flows.cli.options import Store
from infra.store import ArtifactStore
from schemas.errors import BadInput, RunFailed

if TYPE_CHECKING:
    from schemas.manifest import Evaluation, Manifest
    from stages.compare import Comparison, Evaluated


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(compare)


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="A B [C...]", help="Evaluations: artifact, latest:RECIPE, or the path of a report.json. The first is the base."
        ),
    ],
    *,
    paired: Annotated[
        bool,
        typer.Option(
            "--paired", help="Intervals of the differences, of runs that share prompts and noise: from their features, in minutes."
        ),
    ] = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON instead of tables.")] = False,
    store: Store = None,
) -> None:
    """Evaluated runs side by side: every figure, its difference from the first run's, and whether their intervals overlap."""
    if len(runs) < 2:
        raise BadInput(f"compare {runs[0]}: expected at least two evaluated runs")
    if html is not None and not html.absolute().parent.is_dir():
        raise BadInput(f"--html {html}: the folder {html.parent} does not exist")
    from stages.compare import compare as compared

    opened = cache(partial(_opened, store))
    found = _evaluated(runs, opened)
    together = []
    if paired:
        from stages.compare.paired import paired_intervals

        together = [paired_intervals(found[0], other, opened()) for other in found[1:]]
    comparison = compared(found, together)
    if html is not None:
        from stages.compare.page import render_comparison

        try:
            html.write_text(render_comparison(comparison), encoding="utf-8")
        except OSError as error:
            raise RunFailed(f"--html {html}: cannot be written ({error.strerror or error})") from error
    if as_json:
        output.out(json.dumps(comparison.as_json(), indent=2))
        return
    _print(comparison)
    if html is not None:
        output.print(f"page: {html}")


def _opened(address: str | None) -> ArtifactStore:
    from flows.preparation import open_store

    return open_store(address)


def _evaluated(references: Sequence[str], opened: Callable[[], ArtifactStore]) -> "list[Evaluated]":
    """The reports; the store is opened for those that are no paths."""
    from flows.preparation import find_artifact
    from stages.compare import read_report
    from stages.compare.comparison import REPORT

    def read(reference: str) -> "Evaluated":
        path = Path(reference.removeprefix("file://")).expanduser()
        if path.exists():
            return read_report(path, reference)
        store = opened()
        try:
            manifest = find_artifact(store, "evaluate", reference)
        except BadInput as error:
            raise BadInput(f"{reference}: no such file here; {error}") from error
        if manifest.kind != "evaluation":
            raise BadInput(f"{reference}: is an artifact of the kind {manifest.kind}; expected an evaluation")
        label = reference[:12] if reference == manifest.identity else reference
        return replace(read_report(store.fetch(manifest, [REPORT]), label), manifest=cast("Manifest[Evaluation]", manifest))

    return [read(reference) for reference in references]


def _print(comparison: "Comparison") -> None:
    from stages.compare.page import apart_text, difference_text, range_text, value_text

    labels = [run.label for run in comparison.runs]
    for metric, title in comparison.titles.items():
        table = Table("model", "steps", *labels, *(f"{label} - {labels[0]}" for label in labels[1:]), title=title, title_justify="left")
        for line in comparison.of_metric(metric):
            cells = [f"{value_text(found)} ({range_text(found)})" if range_text(found) else value_text(found) for found in line.figures]
            differences = [
                " ".join(filter(None, (difference_text(line, number), apart_text(line, number)))) for number in range(1, len(labels))
            ]
            table.add_row(line.family, str(line.steps), *cells, *differences)
        if table.row_count:
            output.print(table)
    for warning in comparison.warnings:
        output.print(f"warning: {warning}")
