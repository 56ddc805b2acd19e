"""From a YAML file to a `Recipe`, with every mistake named at once by its YAML path and line."""

import reprlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from schemas.base import Mistake, Model, Place
from schemas.errors import BadInput
from schemas.recipe import Recipe
from schemas.yaml_text import parse_yaml


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `section.field=value` overrides, and `section.field+=entry`, which adds one to a list.

    Raises `BadInput` that lists every mistake: YAML path and line, the value found and what was expected.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BadInput(f"recipe {path}: cannot be read ({error}); expected a YAML file") from error
    return read_recipe(text, overrides, where=f"recipe {path}")


def read_recipe(text: str, overrides: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """Parse a recipe from YAML text. Raises `BadInput` as `load_recipe` does."""
    data, lines = parse_yaml(text, where)
    if not isinstance(data, dict):
        raise BadInput(f"{where}: found {type(data).__name__}, expected sections such as 'ingest:'")
    origins = {place: f" (line {line})" for place, line in lines.items()}
    for override in overrides:
        place = _apply(data, override)
        origins = {known: origin for known, origin in origins.items() if known[: len(place)] != place} | {place: " (--set)"}
    return parse_recipe(data, where, origins)


def parse_recipe(data: Any, where: str = "recipe", origins: Mapping[tuple[str, ...], str] | None = None) -> Recipe:
    """Validate plain data as a recipe. `origins` says of a place what to add to its name. Raises `BadInput` with all mistakes."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        # A default that follows from other fields is not made where one of them is wrong: no mistake of its own.
        found = [item for item in error.errors(include_url=False) if item["type"] != "default_factory_not_called"]
        mistakes = [_sentence(item, origins or {}) for item in found]
        if isinstance(data, dict):
            _, unseen = _salvage(Recipe, data, ())
            mistakes += [_disagreement(mistake, origins or {}) for mistake in unseen]
        lines = list(dict.fromkeys(mistakes))
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise BadInput(f"{where}: {count}\n" + "\n".join(f"  {line}" for line in lines)) from error


def _salvage(model: type[Model], data: Mapping[Any, Any], at: Place) -> tuple[Model, list[Mistake]]:
    """Build what is right of a model, and run its cross-checks, which pydantic does not come to once any field is wrong.

    A field that is wrong is not there: a check that reads it is left, and the field is named by its own mistake.
    """
    values: dict[str, Any] = {}
    mistakes: list[Mistake] = []
    for name, field in model.model_fields.items():
        if name not in data:
            if not field.is_required():
                values[name] = field.get_default(call_default_factory=True, validated_data=values)
            continue
        try:
            values[name] = _field_adapter(model, name).validate_python(data[name])
        except ValidationError:
            inner = _model_in(field.annotation)
            if inner is not None and isinstance(data[name], Mapping):
                values[name], deeper = _salvage(inner, data[name], (*at, name))
                mistakes += deeper
    partial = model.model_construct(**values)
    for name in set(model.model_fields) - set(values):
        partial.__dict__.pop(name, None)
    for check in model.cross_checks:
        with suppress(AttributeError):
            for place, value, expected in check(partial):
                mistakes.append(((*at, *place), value, expected))
    return partial, mistakes


@cache
def _field_adapter(model: type[Model], name: str) -> TypeAdapter[Any]:
    field = model.model_fields[name]
    declared: Any = Annotated[field.annotation, field]
    return TypeAdapter(declared)


def _model_in(annotation: Any) -> type[Model] | None:
    """Return the model of `Model` and `Model | None`."""
    found = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type) and issubclass(kind, Model)]
    return found[0] if len(found) == 1 else None


def _sentence(item: ErrorDetails, origins: Mapping[tuple[str, ...], str]) -> str:
    place, kind, message = item["loc"], item["type"], item["msg"]
    if kind == "cross_check":
        return _disagreement((place, item["input"], message), origins)
    if kind == "missing":
        return f"{_name(place, origins)}: missing; expected a value"
    if kind == "extra_forbidden":
        return f"{_name(place, origins)}: found {shown(item['input'])}; expected no such field here"
    return f"{_name(place, origins)}: found {shown(item['input'])}; expected: {message[:1].lower()}{message[1:]}"


def _disagreement(mistake: Mistake, origins: Mapping[tuple[str, ...], str]) -> str:
    place, value, expected = mistake
    return f"{_name(place, origins)}: found {shown(value)}; {expected}"


def _name(place: Place, origins: Mapping[tuple[str, ...], str]) -> str:
    keys = tuple(str(part) for part in place)
    known = next((origins[keys[:length]] for length in range(len(keys), 0, -1) if keys[:length] in origins), "")
    return (".".join(keys) or "(top level)") + known


def shown(value: Any) -> str:
    """Return a value for an error message, cut where it is long."""
    if isinstance(value, Model):
        return "this section"
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to write out numbers of more than a few thousand digits
        return f"a {type(value).__name__} too long to show"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = 8


def _apply(data: dict[Any, Any], override: str) -> tuple[str, ...]:
    """Set one value in the data, or add one to a list; return its place."""
    path, separator, text = override.partition("=")
    keys = path.removesuffix("+").split(".")
    if not separator or not all(keys):
        raise BadInput(f"--set {override}: expected section.field=value, such as lightning.batch_size=16")
    value = parse_yaml(text, f"--set {override}")[0]
    node: Any = data
    for key in keys[:-1]:
        name = _key(node, key)
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            raise BadInput(f"--set {override}: {key} is {shown(node)}, expected a section")
    last = _key(node, keys[-1])
    if not path.endswith("+"):
        node[last] = value
        return tuple(keys)
    listed = node.get(last) or []
    if not isinstance(listed, list):
        raise BadInput(f"--set {override}: {keys[-1]} is {shown(listed)}, expected a list to add to")
    node[last] = [*listed, value]
    return (*keys, str(len(listed)))


def _key(node: dict[Any, Any], key: str) -> Any:
    """YAML reads `4:` as a number; an override's `lightning.links.4` must find it."""
    return next((known for known in node if str(known) == key), int(key) if key.isascii() and key.isdecimal() else key)
