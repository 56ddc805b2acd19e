"""Two or more `report.json` beside each other, row by row and metric by metric."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from schemas.errors import BadInput
from schemas.manifest import Evaluation, Manifest

REPORT: Final = "report.json"

RowKey = tuple[str, int]
"""Family, or family and entry of `evaluate.transfer`; step count."""

Interval = tuple[float, float]
"""Lower and upper end."""


@dataclass(frozen=True)
class Evaluated:
    """One run."""

    label: str
    """As a person named it."""
    report: Mapping[str, Any]
    manifest: Manifest[Evaluation] | None = None
    """Of the artifact; None for a report that is a file."""


@dataclass(frozen=True)
class Figure:
    """A metric of a row in one run."""

    value: float
    low: float | None = None
    high: float | None = None
    """Ends of the interval; None where the report has none."""

    def overlaps(self, other: "Figure") -> bool | None:
        """Whether the intervals have a point in common; None where one is not known."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return None
        return max(self.low, other.low) <= min(self.high, other.high)


@dataclass(frozen=True)
class Line:
    """One metric of one row in every run."""

    family: str
    steps: int
    metric: str
    figures: tuple[Figure | None, ...]
    """In the order of the runs; None where a run has no such row or metric."""
    paired: tuple[Interval | None, ...] = ()
    """Of the runs after the first, where they were asked for: the interval of the difference, of resamples that both runs share."""

    def difference(self, number: int) -> float | None:
        """Of a run's value from the first run's."""
        first, other = self.figures[0], self.figures[number]
        return None if first is None or other is None else other.value - first.value

    def overlap(self, number: int) -> bool | None:
        """Whether a run's interval and the first run's have a point in common; None where one is not there."""
        first, other = self.figures[0], self.figures[number]
        return None if first is None or other is None else first.overlaps(other)

    def paired_interval(self, number: int) -> Interval | None:
        """Of a run's difference from the first, where it is known."""
        return self.paired[number - 1] if self.paired else None


@dataclass(frozen=True)
class Comparison:
    """What is shown."""

    runs: tuple[Evaluated, ...]
    titles: Mapping[str, str]
    """Of the metrics, in order."""
    lines: tuple[Line, ...]
    warnings: tuple[str, ...]
    """Why figures do not compare."""

    def of_metric(self, metric: str) -> tuple[Line, ...]:
        """The lines of one metric."""
        return tuple(line for line in self.lines if line.metric == metric)

    def as_json(self) -> dict[str, Any]:
        """Plain data: every line with its values, and differences from the first run's."""
        others = range(1, len(self.runs))
        return {
            "schema_version": 1,
            "runs": [{"label": run.label, "artifact": run.report["artifact"]} for run in self.runs],
            "warnings": list(self.warnings),
            "metrics": dict(self.titles),
            "lines": [
                {
                    "family": line.family,
                    "steps": line.steps,
                    "metric": line.metric,
                    "values": [None if found is None else found.value for found in line.figures],
                    "intervals": [None if found is None or found.low is None else [found.low, found.high] for found in line.figures],
                    "differences": [line.difference(number) for number in others],
                    "difference_intervals": [line.paired_interval(number) for number in others],
                    "intervals_overlap": [line.overlap(number) for number in others],
                }
                for line in self.lines
            ],
        }


def read_report(path: Path, label: str) -> Evaluated:
    """Read a `report.json`, or the one in a folder. Raises `BadInput` for a file that is none."""
    file = path / REPORT if path.is_dir() else path
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{label}: {file.name} cannot be read ({error}); expected the {REPORT} of an evaluation") from error
    known = ("artifact", "extractor", "metrics", "rows", "samples", "teacher")
    missing = [name for name in known if name not in report] if isinstance(report, dict) else list(known)
    if missing or not report["rows"]:
        raise BadInput(f"{label}: {file.name} has no {', '.join(missing) or 'rows'}; expected the {REPORT} of an evaluation")
    return Evaluated(label, report)


def compare(runs: Sequence[Evaluated], paired: Sequence[Mapping[tuple[RowKey, str], Interval]] = ()) -> Comparison:
    """Put evaluated runs beside each other: rows of the same family and step count, the first run's first. `paired` has intervals of differences by
    row and metric, for each run after the first. Raises `BadInput` for fewer than two."""
    if len(runs) < 2:
        raise BadInput(f"compare: {len(runs)} evaluated run; expected at least two")
    titles: dict[str, str] = {}
    rows: dict[RowKey, None] = {}
    tables = [_figures(run.report) for run in runs]
    for run, table in zip(runs, tables, strict=True):
        titles |= {metric: title for metric, title in run.report["metrics"].items() if metric not in titles}
        rows |= {row: None for row, _ in table if row not in rows}
    lines = [
        Line(*row, metric, figures, tuple(found.get((row, metric)) for found in paired))
        for metric in titles
        for row in rows
        if any(figures := tuple(table.get((row, metric)) for table in tables))
    ]
    return Comparison(tuple(runs), titles, tuple(lines), tuple(_warnings(runs)))


def _figures(report: Mapping[str, Any]) -> dict[tuple[RowKey, str], Figure]:
    """Every figure of a report by row and metric."""
    found = {
        ((row["family"], row["steps"]), metric): Figure(value, *row.get("intervals", {}).get(metric, ()))
        for row in report["rows"]
        for metric, value in row["scores"].items()
    }
    for entry in report.get("transfers", ()):
        for row in entry["rows"]:
            found[(f"{row['family']} on {entry['name']}", row["steps"]), "fid_teacher"] = Figure(
                row["fid_teacher"], *row.get("interval", ())
            )
    return found


def _real(report: Mapping[str, Any]) -> str:
    """Which real images, and how many."""
    wanted = report["real_images_from"]
    wanted = "select" if wanted == "selection" else wanted
    identity = next((artifact["identity"][:12] for artifact in report["lineage"] if artifact["node"] == wanted), "unknown")
    return f"{report['real_images']} of {identity}"


def _network(report: Mapping[str, Any]) -> str:
    """The feature network, with the digest of weights that the recipe names."""
    network = report["extractor"]
    return " ".join(filter(None, (network["name"], (network.get("weights") or "")[:12])))


_NO_FIGURE: Final = "no figure of one compares with one of the other"
_TEACHERS: Final = "figures against the teacher do not compare"
_REAL: Final = "figures against real images do not compare"

_SETTINGS: Final[tuple[tuple[str, Callable[[Mapping[str, Any]], Any], str], ...]] = (
    ("the feature network", _network, _NO_FIGURE),
    ("the number of images", lambda report: report["samples"]["images"], "FID falls with their number: " + _NO_FIGURE),
    ("the prompts", lambda report: report["samples"]["prompts_sha256"][:12], _NO_FIGURE),
    ("the seed", lambda report: report["samples"]["seed"], "rows were drawn from other noise, so that small differences may be chance"),
    ("the side shown to the network", lambda report: report["config"].get("resize_px"), _NO_FIGURE),
    ("the side of a patch", lambda report: report["config"].get("patch_px"), "patch FIDs do not compare"),
    ("the perceptual distance", lambda report: report["config"].get("perceptual"), "LPIPS and diversity do not compare"),
    ("the prefix of prompts", lambda report: report["config"].get("clip_prefix"), "CLIP scores do not compare"),
    ("the teacher", lambda report: report["teacher"]["weights_digest"][:12], _TEACHERS),
    ("the teacher's guidance", lambda report: report["samples"]["teacher_guidance_scale"], _TEACHERS),
    ("the reference's steps", lambda report: report["rows"][0]["steps"], _TEACHERS),
    ("the real images", _real, _REAL),
    ("the confidence of intervals", lambda report: report["intervals"]["confidence"], "intervals do not compare"),
)
"""What must be equal for figures to compare, and what is lost where it is not."""


def _warnings(runs: Sequence[Evaluated]) -> Iterator[str]:
    for what, look, lost in _SETTINGS:
        values = [look(run.report) for run in runs]
        if any(value != values[0] for value in values):
            shown = ", ".join(f"{run.label} {_shown(value)}" for run, value in zip(runs, values, strict=True))
            yield f"Not equal: {what} ({shown}); {lost}."


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(str(item) for item in value.values())
    return "none" if value is None else str(value)
