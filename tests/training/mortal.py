"""A workspace that dies at a chosen moment, as a machine does."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.workspace import Workspace


class Killed(BaseException):
    """Stands for SIGKILL: nothing reaches the store after it."""


@dataclass(frozen=True)
class Mortal(Workspace):
    """Lives until its store has been written to so many times."""

    lives: list[int] = field(default_factory=list)

    def spend(self) -> None:
        self.lives[0] -= 1
        if self.lives[0] < 0:
            raise Killed

    def save_part(self, *arguments: Any, **named: Any) -> Any:
        self.spend()
        return super().save_part(*arguments, **named)

    def delete_parts(self, names: Sequence[str]) -> None:
        if names:
            self.spend()
        super().delete_parts(names)

    @classmethod
    def of(cls, workspace: Workspace, lives: int) -> "Mortal":
        return cls(**vars(workspace), lives=[lives])
