"""Charts as inline SVG. Colours are classes that the page's style sheet fills, so that one chart serves light and dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup, escape

_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 12, 42
_MARKERS: Final = ("circle", "square", "diamond", "triangle")


@dataclass(frozen=True)
class Series:
    """One line: points (x, y), y positive on a logarithmic axis."""

    label: str
    points: tuple[tuple[float, float], ...]
    slot: int
    """Colour class `s<slot>`, the same for one family on every chart."""
    markers: bool = True


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    round_x: bool = False,
    falling_x: bool = False,
    marks: Sequence[float] = (),
    size: tuple[int, int] = (420, 270),
) -> Markup:
    """Draw lines over x and y.

    `log_x`: logarithmic axis whose ticks are the x values that occur (step counts), or with `round_x` round ones. `log_y`: base-10 axis. `falling_x`:
    largest x on the left.
    `marks`: values of x where something happened, as dashed lines; those beyond the points are left out.
    `size` is the drawing's (width, height) in its own pixels, at which the text is legible. Lines without points are left out; a chart without
    any point is an empty string.
    """
    width, height = size
    drawn = [line for line in series if line.points]
    if not drawn:
        return Markup("")
    xs = sorted({x for line in drawn for x, _ in line.points})
    ys = [y for line in drawn for _, y in line.points]
    x_axis = _Axis.over(xs[0], xs[-1], _LEFT, width - _RIGHT, log=log_x, flip=falling_x, pad=0.06 if log_x else 0.0)
    y_low, y_high = _limits(min(ys), max(ys), log_y)
    y_axis = _Axis.over(y_low, y_high, height - _BOTTOM, _TOP, log=log_y, flip=False, pad=0.0)

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    for tick in _ticks(y_low, y_high, log_y):
        y = y_axis(tick)
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    parts.extend(
        f'<text class="tick" x="{x_axis(tick):.1f}" y="{height - _BOTTOM + 18}" text-anchor="middle">{_short(tick)}</text>'
        for tick in (xs if log_x and not round_x else _apart(_ticks(xs[0], xs[-1], log=log_x), x_axis))
    )
    parts.append(f'<text class="axis" x="{width - _RIGHT}" y="{height - 5}" text-anchor="end">{escape(x_label)}</text>')
    parts.append(f'<text class="axis" x="{_LEFT}" y="{height - 5}">{escape(y_label)}</text>')
    parts.extend(
        f'<line class="threshold" x1="{x_axis(x):.1f}" x2="{x_axis(x):.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"><title>{_short(x)}</title></line>'
        for x in marks
        if xs[0] <= x <= xs[-1]
    )
    for line in drawn:
        placed = [(x_axis(x), y_axis(y), y) for x, y in sorted(line.points, reverse=falling_x)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in placed)
        parts.append(f'<polyline class="line s{line.slot}" points="{path}"/>')
        if line.markers:
            parts.extend(_marker(line.slot, x, y, f"{line.label}: {value:.4g}") for x, y, value in placed)
    parts.append("</svg>")
    return Markup("".join(parts))


def histogram(
    counts: Sequence[int],
    edges: Sequence[float],
    *,
    title: str,
    x_label: str,
    threshold: float | None = None,
    low_passes: bool = False,
    log_x: bool = False,
    size: tuple[int, int] = (420, 210),
) -> Markup:
    """Draw the counts of bins between `edges` (one more than counts, ascending), with a threshold marked and the failing side in another colour.

    Empty bins at both ends are left out, as far as the threshold allows. A histogram without any count is an empty string.
    """
    filled = [number for number, count in enumerate(counts) if count]
    if not filled:
        return Markup("")
    first, last = max(filled[0] - 1, 0), min(filled[-1] + 2, len(counts))
    if threshold is not None:  # a bin beyond it at either side
        first = min(first, max(sum(edge <= threshold for edge in edges) - 2, 0))
        last = max(last, min(sum(edge < threshold for edge in edges) + 1, len(counts)))
    width, height = size
    x_axis = _Axis.over(edges[first], edges[last], _LEFT, width - _RIGHT, log=log_x, flip=False, pad=0.0)
    most = max(counts)
    y_axis = _Axis.over(0.0, _limits(0.0, most, log=False)[1], height - _BOTTOM, _TOP + 12, log=False, flip=False, pad=0.0)

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    for tick in _ticks(0.0, _limits(0.0, most, log=False)[1], log=False):
        if tick == int(tick):  # there is no half picture
            parts.append(f'<line class="rule" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y_axis(tick):.1f}" y2="{y_axis(tick):.1f}"/>')
            parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y_axis(tick) + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    for number in range(first, last):
        low, high, count = edges[number], edges[number + 1], counts[number]
        if count:
            middle = math.sqrt(low * high) if log_x else (low + high) / 2
            fails = threshold is not None and (middle > threshold if low_passes else middle < threshold)
            left, right, top = x_axis(low), x_axis(high), min(y_axis(count), y_axis(0) - 1)
            parts.append(
                f'<rect class="column{" fails" if fails else ""}" x="{left + 0.5:.1f}" y="{top:.1f}" width="{max(right - left - 1, 0.8):.1f}" '
                f'height="{y_axis(0) - top:.1f}"><title>{low:.4g} to {high:.4g}: {count}</title></rect>'
            )
    parts.extend(
        f'<text class="tick" x="{x_axis(tick):.1f}" y="{height - _BOTTOM + 18}" text-anchor="middle">{_short(tick)}</text>'
        for tick in _apart(_ticks(edges[first], edges[last], log=log_x), x_axis)
    )
    parts.append(f'<text class="axis" x="{width - _RIGHT}" y="{height - 5}" text-anchor="end">{escape(x_label)}</text>')
    if threshold is not None:
        x = x_axis(min(max(threshold, edges[first]), edges[last]))
        anchor = "start" if x < width / 2 else "end"
        parts.append(f'<line class="threshold" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>')
        parts.append(
            f'<text class="limit" x="{x + (6 if anchor == "start" else -6):.1f}" y="{_TOP + 8}" text-anchor="{anchor}">{threshold:.4g}</text>'
        )
    parts.append("</svg>")
    return Markup("".join(parts))


def swatch(slot: int) -> Markup:
    """The line and marker of a colour, for a legend."""
    return Markup(
        f'<svg class="swatch" viewBox="0 0 26 12" aria-hidden="true"><line class="line s{slot}" x1="1" x2="25" y1="6" y2="6"/>'
        f"{_marker(slot, 13, 6, '')}</svg>"
    )


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float
    log: bool

    @classmethod
    def over(cls, low: float, high: float, start: float, end: float, *, log: bool, flip: bool, pad: float) -> "_Axis":
        low, high = (math.log(low), math.log(high)) if log else (low, high)
        if high - low < 1e-12:
            low, high = low - 0.5, high + 0.5
        room = (high - low) * pad
        low, high = low - room, high + room
        return cls(high, low, start, end, log) if flip else cls(low, high, start, end, log)

    def __call__(self, value: float) -> float:
        position = math.log(value) if self.log else value
        return self.start + (position - self.low) / (self.high - self.low) * (self.end - self.start)


def _limits(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        return low / 1.15, high * 1.15
    step = _step(0.0, high or 1.0)
    return min(0.0, low), math.ceil((high or 1.0) / step) * step


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        steps = (1, 2, 5) if high / low < 300 else (1,)
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high] or [low, high]
    step = _step(low, high)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _apart(ticks: Sequence[float], axis: "_Axis", pixels: float = 34.0) -> list[float]:
    """Those ticks whose labels do not run into each other."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or abs(axis(tick) - axis(kept[-1])) >= pixels:
            kept.append(tick)
    return kept


def _step(low: float, high: float) -> float:
    rough = max(high - low, 1e-12) / 4
    scale = 10.0 ** math.floor(math.log10(rough))
    return next(factor * scale for factor in (1, 2, 2.5, 5, 10) if factor * scale >= rough * 0.999)


def _short(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _marker(slot: int, x: float, y: float, title: str) -> str:
    shape = _MARKERS[slot % len(_MARKERS)]
    inner = f"<title>{escape(title)}</title>" if title else ""
    if shape == "circle":
        return f'<circle class="mark s{slot}" cx="{x:.1f}" cy="{y:.1f}" r="4.5">{inner}</circle>'
    corners = {
        "square": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        "diamond": ((0, -5.6), (5.6, 0), (0, 5.6), (-5.6, 0)),
        "triangle": ((0, -5.4), (5, 4), (-5, 4)),
    }[shape]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon class="mark s{slot}" points="{points}">{inner}</polygon>'
