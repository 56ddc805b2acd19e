"""The part of a report that says where its result comes from: with what it took and how it was run once the chain has ended, without before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from schemas.manifest import Cost
from stages.reports.ancestry import Row, outside
from stages.reports.cost import cost_table
from stages.reports.graph import lineage_graph
from stages.reports.page import page_environment

BEGIN: Final = "<!-- chain -->"
END: Final = "<!-- /chain -->"
"""What stands around the part in a page, so that a later one can take its place."""


@dataclass(frozen=True)
class ChainRun:
    """How a chain was run, which is no part of its results."""

    file: str
    """Name of a file with the recipe."""
    recipe: str
    """What is in it."""
    revisions: tuple[str, ...]
    """Of the code, by which stages were made."""
    libraries: tuple[str, ...]
    """Names with versions."""
    devices: tuple[str, ...]


def chain_part(rows: Sequence[Row], costs: Mapping[str, Cost] | None = None, run: ChainRun | None = None) -> Markup:
    """Lineage graph, table and commands of the artifacts `rows`, the result last; `costs` by identity, of each of them."""
    template = page_environment("stages.reports").get_template("chain.html.j2")
    part = template.render(rows=rows, outside=outside(rows), graph=lineage_graph(rows), costs=cost_table(costs or {}), run=run)
    return Markup(f"{BEGIN}\n{part}\n{END}")


def replace_chain_part(page: str, part: Markup) -> str:
    """The page with another such part in the place of its own. A page without one is a mistake of the caller."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, "the page has a part to replace"
    return before + str(part) + after
