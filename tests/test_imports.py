"""The rooms and the direction of the arrows between them, read from the source: no import may run back."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "schemas": set(),
    "infra": {"schemas"},
    "stages": {"schemas", "infra"},
    "flows": {"schemas", "infra", "stages"},
}
FORBIDDEN = {
    "schemas": {"torch", "prefect", "numpy", "fsspec", "diffusers"},
    "infra": {"prefect"},
    "stages": {"prefect"},
    "flows": set(),
}


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and top-level package of every import, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides which room it comes from"
            yield node.lineno, (node.module or "").partition(".")[0]
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value).partition(".")[0]


def wrong_imports(room: str, source: str) -> list[str]:
    refused = (set(MAY_IMPORT) - MAY_IMPORT[room] - {room}) | FORBIDDEN[room] | {"tests", "benchmarks"}
    return [f"line {line}: {package}" for line, package in imported(ast.parse(source)) if package in refused]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_arrows_run_one_way(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    wrong = {str(path.relative_to(ROOT)): found for path in files if (found := wrong_imports(room, path.read_text(encoding="utf-8")))}
    assert wrong == {}


def test_every_top_level_package_is_a_room() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert packages == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("schemas", "import torch.nn"),
        ("schemas", "from infra.store import ArtifactStore"),
        ("stages", "def run():\n    from prefect import task"),
        ("stages", "from flows.chain import distill_chain"),
        ("infra", "import importlib\nimportlib.import_module('stages.plan')"),
    ],
)
def test_a_wrong_import_is_found(room: str, source: str) -> None:
    assert wrong_imports(room, source)
