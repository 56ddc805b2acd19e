"""How sharpness falls with blur, as it was measured once on real photographs: `sharpness_curve.json` beside this file."""

import json
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from stages.reports.charts import Series, line_chart, swatch


def calibration(threshold: float) -> dict[str, Any] | None:
    """The chart of the median at each strength of each degradation, with the threshold, for the report; None where there is no curve."""
    source = files("stages.select") / "sharpness_curve.json"
    if not source.is_file():
        return None
    curve = json.loads(source.read_text(encoding="utf-8"))
    series = [
        Series(one["name"], tuple((float(x), float(y)) for x, y in one["points"]), 1 + number) for number, one in enumerate(curve["series"])
    ]
    ends = [x for line in series for x, _ in line.points]
    limit = Series("threshold", ((min(ends), threshold), (max(ends), threshold)), 0, markers=False)
    drawn = [*series, limit] if threshold > 0 else series
    chart: Markup = line_chart(
        drawn, title="Sharpness by strength of blur", x_label=curve["x_label"], y_label="median sharpness", log_y=True, size=(860, 320)
    )
    return {"svg": chart, "legend": [(line.label, swatch(line.slot)) for line in drawn], "note": curve.get("note", "")}
