"""The report of a selection: `report.json`, and `report.html`, which asks nothing of any server. Equal findings give equal bytes."""

import bisect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from schemas.data import SelectConfig
from schemas.manifest import Manifest, Measurements
from stages.reports.charts import histogram
from stages.reports.page import funnel, grouped, page_environment
from stages.select.calibration import calibration
from stages.select.criteria import SAME_FILE, SAME_PICTURE
from stages.select.fingerprints import Doubles
from stages.select.pictures import Spot, thumbnails
from stages.select.survey import AXES, SAMPLED_SHARDS, Shown, Survey
from stages.workspace import Workspace

_CAPTION_CHARACTERS: Final = 160


@dataclass(frozen=True)
class Findings:
    """All that one selection found out."""

    rows: int
    dropped: dict[str, int]
    """By reason, in the order of the reasons."""
    changed: dict[str, int]
    """Captions changed, by rule."""
    examples: dict[str, tuple[tuple[str, str], ...]]
    """By rule: raw and cleaned."""
    survey: Survey
    doubles: Doubles
    starts: dict[int, int]
    """Position of the first row of every shard among all rows."""

    @property
    def passed(self) -> int:
        """Pictures selected."""
        return self.rows - sum(self.dropped.values())

    def spot(self, row: int) -> Spot:
        """Where a row lies: its shard, and its position there."""
        shards = list(self.starts)
        shard = shards[bisect.bisect_right(list(self.starts.values()), row) - 1]
        return shard, row - self.starts[shard]


def write_report(
    folder: Path, findings: Findings, config: SelectConfig, measurements: Manifest[Measurements], workspace: Workspace
) -> None:
    """Write both files."""
    summary = summarise(findings, config, measurements)
    (folder / "report.json").write_text(json.dumps(summary, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    pictures = thumbnails(measurements, _spots(findings), workspace)
    (folder / "report.html").write_text(render(summary, findings, pictures), encoding="utf-8")


def summarise(findings: Findings, config: SelectConfig, measurements: Manifest[Measurements]) -> dict[str, Any]:
    """Return the content of `report.json`: no dates, hosts or places."""
    return {
        "schema_version": 1,
        "measurements": measurements.identity,
        "rows": findings.rows,
        "passed": findings.passed,
        "dropped": findings.dropped,
        "criteria": {reason: _criterion(reason, findings) for reason in AXES},
        "captions": {
            "changed": findings.changed,
            "examples": {rule: [{"raw": raw, "cleaned": cleaned} for raw, cleaned in pairs] for rule, pairs in findings.examples.items()},
        },
        "doubles": [{"dropped_row": dropped, "kept_row": kept, "bits": bits} for dropped, kept, bits in findings.doubles.examples],
        "sampled_shards": len(findings.survey.sampled),
        "shards": measurements.content.shards,
        "config": config.identity_fields(),
    }


def _criterion(reason: str, findings: Findings) -> dict[str, Any]:
    axis, tally = AXES[reason], findings.survey.tallies[reason]
    return {
        "title": axis.title,
        "passes": axis.says,
        "threshold": findings.survey.thresholds[reason],
        "measured": tally.measured,
        "fails": tally.fails,
        "dropped": findings.dropped.get(reason, 0),
        "edges": [float(f"{edge:.6g}") for edge in axis.edges],
        "counts": tally.counts.tolist(),
        "passing": [{"key": shown.key, "value": shown.value} for shown in tally.passing],
        "failing": [{"key": shown.key, "value": shown.value} for shown in tally.failing],
    }


def _spots(findings: Findings) -> list[Spot]:
    shown = [one for tally in findings.survey.tallies.values() for one in (*tally.passing, *tally.failing)]
    doubles = [findings.spot(row) for dropped, kept, _ in findings.doubles.examples for row in (dropped, kept)]
    return [(one.shard, one.place) for one in shown] + doubles


def render(summary: Mapping[str, Any], findings: Findings, pictures: Mapping[Spot, str]) -> str:
    """Return the page."""
    environment = page_environment("stages.select")
    environment.filters |= {"short": _short, "number": _number}
    dropped = findings.dropped
    return environment.get_template("report.html.j2").render(
        summary=summary,
        verdict=_verdict(findings),
        tiles=_tiles(findings),
        stations=funnel(_stations(findings)),
        criteria=[_card(reason, summary["criteria"][reason], findings, pictures) for reason in AXES if _is_shown(summary, reason)],
        silent=[AXES[reason].title.lower() for reason in AXES if _is_silent(summary, reason)],
        captions={reason: count for reason, count in dropped.items() if reason.startswith("caption ")},
        doubles=[_pair(one, findings, pictures) for one in findings.doubles.examples],
        same_file=dropped.get(SAME_FILE, 0),
        same_picture=dropped.get(SAME_PICTURE, 0),
        sampled_shards=SAMPLED_SHARDS,
        calibration=calibration(summary["config"]["min_sharpness"], summary["config"]["min_high_frequency"]),
        config=yaml.safe_dump({"select": summary["config"]}, sort_keys=False, allow_unicode=True),
    )


def _is_shown(summary: Mapping[str, Any], reason: str) -> bool:
    return bool(summary["criteria"][reason]["measured"])


def _is_silent(summary: Mapping[str, Any], reason: str) -> bool:
    criterion = summary["criteria"][reason]
    return criterion["threshold"] is not None and not criterion["measured"]


def _verdict(findings: Findings) -> str:
    share = findings.passed / findings.rows
    sentence = f"{grouped(findings.passed)} of {grouped(findings.rows)} pictures pass ({share:.1%})."
    most = sorted(findings.dropped.items(), key=lambda entry: -entry[1])[:3]
    if most:
        sentence += " Most are lost to " + ", ".join(f"{reason} ({grouped(count)})" for reason, count in most) + "."
    return sentence


def _tiles(findings: Findings) -> list[dict[str, Any]]:
    doubles = findings.dropped.get(SAME_FILE, 0) + findings.dropped.get(SAME_PICTURE, 0)
    return [
        {"label": "pictures measured", "value": findings.rows},
        {"label": "selected", "value": findings.passed},
        {"label": "dropped", "value": findings.rows - findings.passed},
        {"label": "of those, doubles", "value": doubles},
    ]


def _stations(findings: Findings) -> list[dict[str, Any]]:
    left = findings.rows
    stations: list[dict[str, Any]] = [{"label": "measured", "count": left, "lost": {}}]
    for reason, count in findings.dropped.items():
        left -= count
        stations.append({"label": f"past {reason}", "count": left, "lost": {reason: count}})
    return [*stations, {"label": "selected", "count": findings.passed, "lost": {}}]


def _card(reason: str, criterion: Mapping[str, Any], findings: Findings, pictures: Mapping[Spot, str]) -> dict[str, Any]:
    axis, tally = AXES[reason], findings.survey.tallies[reason]
    threshold = criterion["threshold"]
    rule = "not looked at" if threshold is None else f"passes: {axis.says} {_number(threshold)} {axis.unit}".rstrip()
    return {
        **criterion,
        "reason": reason,
        "rule": rule,
        "svg": histogram(
            criterion["counts"],
            criterion["edges"],
            title=f"{axis.title}: pictures by value",
            x_label=axis.unit or axis.title.lower(),
            threshold=threshold,
            low_passes=axis.low_passes,
            log_x=axis.log,
        ),
        "sides": [("Just past it", _shown(tally.passing, pictures)), ("Just short of it", _shown(tally.failing, pictures))],
        "hidden": not axis.pictures and reason == "unsafe",
    }


def _shown(samples: Iterable[Shown], pictures: Mapping[Spot, str]) -> list[dict[str, str]]:
    return [
        {"key": one.key, "value": _number(one.value), "uri": pictures[one.shard, one.place]}
        for one in samples
        if (one.shard, one.place) in pictures
    ]


def _pair(pair: Sequence[int], findings: Findings, pictures: Mapping[Spot, str]) -> dict[str, Any]:
    dropped, kept, bits = pair
    return {"dropped": pictures.get(findings.spot(dropped)), "kept": pictures.get(findings.spot(kept)), "bits": bits, "row": dropped}


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else grouped(round(value))


def _short(text: str) -> str:
    return text if len(text) <= _CAPTION_CHARACTERS else text[: _CAPTION_CHARACTERS - 1] + "…"
