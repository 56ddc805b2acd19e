"""A lineage as inline SVG: layers from top to bottom, each artifact just above what first reads it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from markupsafe import Markup, escape

from stages.reports.ancestry import Row, outside

_HEIGHT, _ROOM, _GAP, _MARGIN = 44, 30, 22, 8
_LETTER_PX: Final = 7.4
_THREAD: Final = 14
"""Width that a line needs where it passes a layer."""
_SWEEPS: Final = 4

Point = tuple[str, int]
"""An artifact or a file, or in a layer between the place where a line passes: (name, layer)."""


@dataclass(frozen=True)
class _Node:
    name: str
    title: str
    made: bool
    reads: tuple[str, ...]


def lineage_graph(rows: Sequence[Row]) -> Markup:
    """Draw the artifacts of `rows`, each after what it reads, and the files from elsewhere that they read, in dashes.

    A line is left out where longer ways say the same. A node links to the anchor `a-<first 12 digits>` and has its whole digest as its title.
    """
    if not rows:
        return Markup("")
    nodes = {digest: _Node(name, f"{name}, from elsewhere: {digest}", False, ()) for digest, name in outside(rows)}
    for row in rows:
        nodes[row["identity"]] = _Node(row["node"], f"{row['kind']} {row['identity']}", True, tuple(dict.fromkeys(row["inputs"].values())))
    edges = _without_shortcuts(nodes)
    layers = _layers(nodes, edges)
    lines = {(source, target): _passing(source, target, layers) for target, sources in edges.items() for source in sources}
    rank = _ordered(layers, list(lines.values()))
    box = max(116.0, max(len(node.name) for node in nodes.values()) * _LETTER_PX + 20)
    place, width = _places(rank, box, nodes)
    height = len(rank) * (_HEIGHT + _ROOM) - _ROOM + 2 * _MARGIN
    parts = [
        f'<svg class="lineage" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}" role="img" aria-label="Lineage graph">'
    ]
    parts += [_line([place[point] for point in points]) for points in lines.values()]
    parts += [_box(digest, node, place[digest, layers[digest]], box) for digest, node in nodes.items()]
    return Markup("".join([*parts, "</svg>"]))


def _without_shortcuts(nodes: Mapping[str, _Node]) -> dict[str, list[str]]:
    """What each node reads, less what it follows from by another of them. Nodes come after what they read."""
    before: dict[str, set[str]] = {}
    edges = {}
    for name, node in nodes.items():
        before[name] = set(node.reads).union(*(before[source] for source in node.reads))
        edges[name] = [source for source in node.reads if not any(source in before[other] for other in node.reads if other != source)]
    return edges


def _layers(nodes: Mapping[str, _Node], edges: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """A layer for each node, 0 at the top: directly above the highest of its readers, as far as that allows."""
    above: dict[str, int] = dict.fromkeys(nodes, 0)  # layers from the bottom
    for name in reversed(list(nodes)):
        for source in edges[name]:
            above[source] = max(above[source], above[name] + 1)
    deepest = max(above.values())
    return {name: deepest - height for name, height in above.items()}


def _passing(source: str, target: str, layers: Mapping[str, int]) -> list[Point]:
    first, last = layers[source], layers[target]
    between = [(f"{source}>{target}", layer) for layer in range(first + 1, last)]
    return [(source, first), *between, (target, last)]


def _ordered(layers: Mapping[str, int], lines: Sequence[Sequence[Point]]) -> list[list[Point]]:
    """Points of each layer from left to right: few lines cross, by Sugiyama's barycentres."""
    rank: list[list[Point]] = [[] for _ in range(max(layers.values()) + 1)]
    for point in dict.fromkeys([*layers.items(), *(point for line in lines for point in line)]):
        rank[point[1]].append(point)
    beside: dict[Point, dict[int, list[Point]]] = {point: {-1: [], 1: []} for layer in rank for point in layer}
    for line in lines:
        for upper, lower in pairwise(line):
            beside[upper][1].append(lower)
            beside[lower][-1].append(upper)
    for sweep in range(_SWEEPS):
        upwards = sweep % 2 == 0
        for layer in rank[::-1] if upwards else rank:
            at = {point: (number + 0.5) / len(other) for other in rank for number, point in enumerate(other)}
            middles = {point: _mean([at[other] for other in beside[point][1 if upwards else -1]], at[point]) for point in layer}
            layer.sort(key=middles.__getitem__)
    return rank


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _places(rank: Sequence[Sequence[Point]], box: float, nodes: Mapping[str, _Node]) -> tuple[dict[Point, tuple[float, float]], float]:
    """Centres of all points, and the width of the drawing: every layer stands in the middle."""

    def wide(point: Point) -> float:
        return box if point[0] in nodes else _THREAD

    widths = [sum(map(wide, layer)) + _GAP * (len(layer) - 1) for layer in rank]
    whole = max(widths) + 2 * _MARGIN
    place = {}
    for number, layer in enumerate(rank):
        left = (whole - widths[number]) / 2
        for point in layer:
            place[point] = (left + wide(point) / 2, _MARGIN + number * (_HEIGHT + _ROOM) + _HEIGHT / 2)
            left += wide(point) + _GAP
    return place, whole


def _line(points: Sequence[tuple[float, float]]) -> str:
    half = _HEIGHT / 2
    path = f"M{points[0][0]:.1f} {points[0][1] + half:.1f}"
    for (x, y), (to_x, to_y) in pairwise(points):
        top, bottom = y + half, to_y - half
        path += f"C{x:.1f} {(top + bottom) / 2:.1f} {to_x:.1f} {(top + bottom) / 2:.1f} {to_x:.1f} {bottom:.1f}"
        if (to_x, to_y) != points[-1]:
            path += f"V{to_y + half:.1f}"
    return f'<path d="{path}"/>'


def _box(digest: str, node: _Node, centre: tuple[float, float], width: float) -> str:
    x, y = centre
    return (
        f'<a href="#a-{digest[:12]}"><title>{escape(node.title)}</title>'
        f'<rect class="{"made" if node.made else "given"}" x="{x - width / 2:.1f}" y="{y - _HEIGHT / 2:.1f}" width="{width:.1f}" '
        f'height="{_HEIGHT}" rx="8"/>'
        f'<text class="node" x="{x:.1f}" y="{y - 3:.1f}">{escape(node.name)}</text>'
        f'<text class="digest" x="{x:.1f}" y="{y + 13:.1f}">{digest[:8]}</text></a>'
    )
