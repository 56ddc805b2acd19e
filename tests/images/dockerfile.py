"""As much of Dockerfiles and .dockerignore as the tests need: no container engine is here to read them."""

import fnmatch
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

INSTRUCTIONS = {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "EXPOSE", "VOLUME", "HEALTHCHECK", "CMD"}
"""Those that our images use."""


@dataclass
class Stage:
    """What is between one FROM and the next."""

    name: str
    parent: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [rest for name, rest in self.instructions if name == instruction]


@dataclass
class Dockerfile:
    """Stages by name, in order, and the arguments before the first."""

    stages: dict[str, Stage]
    arguments: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> "Dockerfile":
        stages: dict[str, Stage] = {}
        arguments: dict[str, str] = {}
        for name, rest in _instructions(path.read_text(encoding="utf-8")):
            assert name in INSTRUCTIONS, name
            if name == "FROM":
                parent, _, stage = rest.partition(" AS ")
                assert stage and stage not in stages, rest
                stages[stage] = Stage(stage, parent)
            elif not stages:
                assert name == "ARG", f"{name} before the first FROM"
                key, _, value = rest.partition("=")
                arguments[key] = value
            else:
                stages[stage].instructions.append((name, rest))
        return cls(stages, arguments)

    def image(self, target: str) -> list[tuple[str, str]]:
        """Instructions that an image is made by, those of the stages that it builds on first."""
        stage = self.stages[target]
        below = self.image(stage.parent) if stage.parent in self.stages else []
        return below + stage.instructions

    def last(self, target: str, instruction: str) -> str:
        """What counts of an instruction that later ones override."""
        return [rest for name, rest in self.image(target) if name == instruction][-1]

    def command(self, target: str) -> list[str]:
        command: list[str] = json.loads(self.last(target, "CMD"))
        return command

    def health_command(self, target: str) -> list[str] | None:
        found = [rest for name, rest in self.image(target) if name == "HEALTHCHECK"]
        return json.loads(found[-1].partition("CMD ")[2]) if found else None

    def bases(self) -> set[str]:
        """Images from elsewhere."""
        return {self._expanded(stage.parent) for stage in self.stages.values() if stage.parent not in self.stages}

    def _expanded(self, text: str) -> str:
        return re.sub(r"\$\{(\w+)\}", lambda found: self.arguments[found[1]], text)


def copies(stage: Stage) -> Iterator[tuple[str | None, list[str], str]]:
    """Yield of every COPY the stage that it copies from (None: the context), the sources, and where to."""
    for rest in stage.all("COPY"):
        words = shlex.split(rest)
        origin = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else None
        yield origin, words[:-1], words[-1]


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines():
        name, _, rest = line.partition(" ")
        yield name, rest.strip()


class Ignored:
    """What a .dockerignore keeps out of a build's context: of the patterns that match a path, or a folder that it is in, the last counts."""

    def __init__(self, path: Path) -> None:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        self._patterns = [(not line.startswith("!"), line.removeprefix("!")) for line in lines if line and not line.startswith("#")]

    def __call__(self, path: str) -> bool:
        names = path.split("/")
        places = ["/".join(names[: end + 1]) for end in range(len(names))]
        ignored = False
        for ignores, pattern in self._patterns:
            if any(_matches(place, pattern) for place in places):
                ignored = ignores
        return ignored


def _matches(path: str, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return fnmatch.fnmatchcase(path.rpartition("/")[2], pattern[3:])
    assert "**" not in pattern, "not needed so far"
    return path.count("/") == pattern.count("/") and fnmatch.fnmatchcase(path, pattern)
