"""What stages took, as columns of a table: those of `Cost` that there is something to say of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from schemas.manifest import Cost
from stages.encoded_size import human


@dataclass(frozen=True)
class CostColumn:
    """A field of `Cost` for people."""

    field: str
    title: str
    shown: Callable[[Any], str]
    together: Callable[[Sequence[Any]], Any] | None
    """What all stages took; None where that says nothing."""


@dataclass(frozen=True)
class CostTable:
    """Columns, a line of cells for each artifact, and the last line, of all of them."""

    titles: tuple[str, ...]
    cells: Mapping[str, tuple[str, ...]]
    """By identity."""
    total: tuple[str, ...]


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `5 h 12 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def _hours(hours: float) -> str:
    return f"{hours:.2f}" if hours < 100 else f"{hours:.0f}"


COLUMNS: Final = (
    CostColumn("wall_seconds", "time", duration, sum),
    CostColumn("gpu_hours", "GPU hours", _hours, sum),
    CostColumn("peak_memory_bytes", "host memory", human, None),
    CostColumn("peak_device_bytes", "GPU memory", human, None),
    CostColumn("bytes_read", "read", human, sum),
    CostColumn("bytes_written", "written", human, sum),
    CostColumn("attempts", "attempts", lambda count: f"{count:.0f}", None),
)
"""A field that `Cost` does not have, or that is zero or null for every artifact, has no column; `attempts` has one where there was more than one."""


def cost_table(costs: Mapping[str, Cost]) -> CostTable:
    """The table of what artifacts took, by identity."""
    values: dict[str, dict[str, Any]] = {identity: cost.model_dump() for identity, cost in costs.items()}
    columns = [column for column in COLUMNS if any((of.get(column.field) or 0) > (column.field == "attempts") for of in values.values())]

    def total(column: CostColumn) -> str:
        found = [of[column.field] for of in values.values() if of.get(column.field) is not None]
        return "" if column.together is None else column.shown(column.together(found))

    return CostTable(
        titles=tuple(column.title for column in columns),
        cells={
            identity: tuple("" if of.get(column.field) is None else column.shown(of[column.field]) for column in columns)
            for identity, of in values.items()
        },
        total=tuple(map(total, columns)),
    )
