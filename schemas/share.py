"""A share of a stage's shards: what one of several workers makes of an artifact that all of them make together."""

import re
from dataclasses import dataclass
from typing import Annotated, Final, Self

from pydantic import StringConstraints

from schemas.errors import BadInput

_FORM: Final = re.compile(r"([1-9][0-9]{0,5})/([1-9][0-9]{0,5})")

ShareText = Annotated[str, StringConstraints(pattern=rf"^{_FORM.pattern}$")]
"""As forms and the command line take it: `2/4` is the second of four."""


@dataclass(frozen=True)
class Share:
    """The shards whose number leaves `number` - 1 when divided by `of`."""

    number: int
    """From 1 on."""
    of: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `2/4`. Raises `BadInput`."""
        found = _FORM.fullmatch(text)
        if found is None or int(found[1]) > int(found[2]):
            raise BadInput(f"share {text!r}: expected NUMBER/SHARES with a number from 1 to the shares, such as 2/4")
        return cls(int(found[1]), int(found[2]))

    @classmethod
    def all(cls, of: int) -> tuple[Self, ...]:
        """Every share of so many."""
        return tuple(cls(number, of) for number in range(1, of + 1))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def part(self) -> str:
        """Name of the part that says that it is made."""
        return f"share-{self.number}-of-{self.of}"

    def has(self, shard: int) -> bool:
        """Whether a shard, counted from 0 on, is in it."""
        return shard % self.of == self.number - 1
