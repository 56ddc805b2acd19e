"""Pages and cards from templates: `style.css.j2` and `parts.html.j2` of this package serve all pages."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup


def page_environment(package: str) -> Environment:
    """The environment of the templates that lie in a package, with the filters `plural` and `grouped`. What a page leaves undefined is an error."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader("stages.reports", ".")]),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"plural": plural, "grouped": grouped}
    return environment


def card_environment(package: str) -> Environment:
    """The environment of the Markdown templates that lie in a package: nothing is escaped, and what a card leaves undefined is an error."""
    return Environment(
        loader=PackageLoader(package, "."),
        autoescape=False,  # Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


@dataclass(frozen=True)
class Script:
    """A script inside a page, which the page's policy admits by its digest: nothing else runs there."""

    text: Markup
    sha256: str
    """Base64, as a content security policy takes it."""


def page_script(package: str, name: str) -> Script:
    """The script that lies in a package as it is, to stand between `<script>` and `</script>`."""
    text = resources.files(package).joinpath(name).read_text(encoding="utf-8")
    return Script(Markup(text), base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii"))


def plural(count: int, noun: str) -> str:
    """`1 step`, `4 steps`."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def grouped(number: int) -> str:
    """`12 345`, with narrow spaces that do not break."""
    return f"{number:,}".replace(",", "\u202f")


def funnel(stations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Stations (`label`, `count`, `lost` by reason) as the part `funnel` draws them."""
    most = max((station["count"] for station in stations), default=0) or 1
    return [
        {**station, "percent": f"{100 * station['count'] / most:.1f}", "lost_total": sum(station["lost"].values())} for station in stations
    ]


def data_uri(picture: bytes, kind: str) -> str:
    """The bytes of a picture of a kind (png, jpeg, webp) as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"
