"""What the two numbers of sharpness say, as was measured once on real photographs: `sharpness_curve.json` beside this file.

Written by `python -m benchmarks.sharpness`: `x_label`, `note`, `series` (`name`, `points` as [strength, median sharpness]), the same of
`high_frequency`, and `at_default`, the precision, the recall and the share caught at the default thresholds.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from stages.reports.charts import Series, line_chart, swatch


def calibration(min_sharpness: float, min_high_frequency: float) -> dict[str, Any] | None:
    """The charts of both medians by strength of what spoils a picture, with the thresholds, for the report; None where there is no curve."""
    source = files("stages.select") / "sharpness_curve.json"
    if not source.is_file():
        return None
    curve = json.loads(source.read_text(encoding="utf-8"))
    charts = [_chart("Sharpness by strength of blur", "median sharpness", curve, min_sharpness)]
    if "high_frequency" in curve:
        charts.append(_chart("High frequencies of enlarged pictures", "median share", curve["high_frequency"], min_high_frequency))
    return {"charts": charts, "note": curve.get("note", ""), "at_default": curve.get("at_default", {})}


def _chart(title: str, y_label: str, curve: Mapping[str, Any], threshold: float) -> dict[str, Any]:
    series: Sequence[Series] = [
        Series(one["name"], tuple((float(x), float(y)) for x, y in one["points"] if y > 0), 1 + number)
        for number, one in enumerate(curve["series"])
    ]
    ends = [x for line in series for x, _ in line.points]
    if threshold > 0 and ends:
        series = [*series, Series("threshold", ((min(ends), threshold), (max(ends), threshold)), 0, markers=False)]
    svg: Markup = line_chart(series, title=title, x_label="strength", y_label=y_label, log_y=True, size=(480, 300))
    return {"title": title, "svg": svg, "strength": curve["x_label"], "legend": [(line.label, swatch(line.slot)) for line in series]}
