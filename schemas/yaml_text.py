"""YAML text to plain data: lines remembered, duplicate keys and references to itself refused, one error type for whatever is wrong."""

from typing import Any

import yaml

from schemas.errors import BadInput

MERGE = "tag:yaml.org,2002:merge"

LARGEST = 100_000
"""Values in one file, aliases counted each time: far above any recipe, far below what would fill the memory."""

Lines = dict[tuple[str, ...], int]
"""Line number, from 1, by the path of keys and positions."""


def parse_yaml(text: str, where: str) -> tuple[Any, Lines]:
    """Parse one YAML document. Raises `BadInput` naming `where` and the line."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        lines: Lines = {}
        if node is not None:
            _walk(node, (), lines, (), [0])
        return (None if node is None else _unshared(loader.construct_document(node))), lines
    except yaml.YAMLError as error:
        raise BadInput(f"{where}: not YAML: {error}") from error
    except RecursionError as error:
        raise BadInput(f"{where}: nested too deeply") from error
    except (ValueError, OverflowError) as error:  # a date with month 99, a number of ten thousand digits
        raise BadInput(f"{where}: a value cannot be read: {error}") from error


def _walk(node: yaml.Node, place: tuple[str, ...], lines: Lines, above: tuple[int, ...], count: list[int]) -> None:
    count[0] += 1
    line = node.start_mark.line + 1
    if id(node) in above:
        raise yaml.YAMLError(f"line {line}: the value contains itself")
    if count[0] > LARGEST:
        raise yaml.YAMLError(f"more than {LARGEST:,} values")
    lines.setdefault(place, line)
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            _walk(item, (*place, str(position)), lines, above, count)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            _walk(key, (), {}, above, count)
            name = str(key.value)
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                line = key.start_mark.line + 1
                if (key.tag, name) in seen:
                    raise yaml.YAMLError(f"line {line}: the key {name!r} stands on line {seen[key.tag, name]} already")
                seen[key.tag, name] = lines[*place, name] = line
            _walk(value, (*place, name), lines, above, count)


def _unshared(value: Any) -> Any:
    """Copy what aliases share, so that changing one place changes one place."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unshared(item) for item in value]
    return value
