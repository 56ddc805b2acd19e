"""The code of a published model card, run as a reader would run it."""

import re
from pathlib import Path
from typing import Any

import pytest


def snippets(card: str) -> dict[str, str]:
    """Code of a card by the heading above it."""
    return dict(re.findall(r"^#+ ([^\n]+)\n\n```python\n(.*?)\n```", card, flags=re.M | re.S))


def run_snippet(published: Path, name: str, heading: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a snippet word for word in `folder`, beside the published folder under the model's name; what it has defined."""
    model = folder / name
    if not model.exists():
        model.symlink_to(published)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(compile(snippets((published / "README.md").read_text())[heading], heading, "exec"), names)
    return names
