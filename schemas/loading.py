"""From a YAML file to a `Recipe`, with every mistake named at once by its YAML path."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from schemas.errors import BadInput
from schemas.recipe import Recipe


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `section.field=value` overrides.

    Raises `BadInput` that lists every mistake: YAML path, the value found and what was expected.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"recipe {path}: cannot be read ({error}); expected a YAML file") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(f"recipe {path}: not YAML: {error}") from error
    if not isinstance(data, dict):
        raise BadInput(f"recipe {path}: found {type(data).__name__}, expected sections such as 'ingest:'")
    for override in overrides:
        _apply(data, override)
    return parse_recipe(data, where=f"recipe {path}")


def parse_recipe(data: Any, where: str = "recipe") -> Recipe:
    """Validate plain data as a recipe. Raises `BadInput` with all mistakes."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise BadInput(f"{where}: {error.error_count()} mistake(s)\n" + "\n".join(_lines(error))) from error


def _lines(error: ValidationError) -> list[str]:
    lines = []
    for mistake in error.errors(include_url=False):
        path = ".".join(str(part) for part in mistake["loc"]) or "(top level)"
        if mistake["type"] == "missing":
            lines.append(f"  {path}: missing; expected a value")
        elif mistake["type"] == "extra_forbidden":
            lines.append(f"  {path}: found {mistake['input']!r}; expected no such field here")
        elif mistake["type"] in ("value_error", "cross_section"):
            found = mistake["input"] if not isinstance(mistake["input"], dict) else "this section"
            lines.append(f"  {path}: found {found!r}; {mistake['msg'].removeprefix('Value error, ')}")
        else:
            lines.append(f"  {path}: found {mistake['input']!r}; expected: {mistake['msg'][:1].lower()}{mistake['msg'][1:]}")
    return lines


def _apply(data: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise BadInput(f"--set {override}: expected section.field=value, such as lightning.batch_size=16")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(f"--set {override}: the value is not YAML: {error}") from error
    node: Any = data
    for key in keys[:-1]:
        if node.get(_key(key)) is None:
            node[_key(key)] = {}
        node = node[_key(key)]
        if not isinstance(node, dict):
            raise BadInput(f"--set {override}: {key} is {node!r}, expected a section")
    node[_key(keys[-1])] = value


def _key(key: str) -> Any:
    """YAML reads `4:` as a number; an override's `lightning.links.4` must find it."""
    return int(key) if key.isdigit() else key
