"""What every schema of the project shares: frozen models, and the canonical JSON that identities are digests of."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError

PositiveInt = Annotated[int, Field(ge=1)]

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256 digest, 64 lower-case hex digits."""


class _NotIdentity:
    """Marks a field that says where or how fast, never what: it stays out of the stage's identity."""

    def __repr__(self) -> str:
        return "NotIdentity"


NotIdentity = _NotIdentity()
"""Use as `field: Annotated[int, NotIdentity] = 4`. Changing such a field recomputes nothing."""


Place = tuple[str | int, ...]
"""Where in a model's data something is: field names, keys, positions."""

Mistake = tuple[Place, object, str]
"""Where, the value found there, and a sentence that says what was expected."""


class Model(BaseModel):
    """A frozen pydantic model that refuses unknown fields, infinities and NaN."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        field_title_generator=lambda name, _: name,  # forms then name every field, sections too, as a recipe and its mistakes do
    )

    cross_checks: ClassVar[tuple[Callable[[Any], Iterable[Mistake]], ...]] = ()
    """What no field can check alone. Every mistake of every check is reported, each at its own place."""

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        mistakes = [mistake for check in self.cross_checks for mistake in check(self)]
        if mistakes:
            raise ValidationError.from_exception_data(
                type(self).__name__,
                [
                    InitErrorDetails(type=PydanticCustomError("cross_check", "{expected}", {"expected": expected}), loc=path, input=value)
                    for path, value, expected in mistakes
                ],
            )
        return self

    def identity_fields(self) -> dict[str, Any]:
        """Return the JSON form of the fields that change the result (those not marked `NotIdentity`), recursively."""
        dumped = self.model_dump(mode="json")
        return {
            name: _identity_value(getattr(self, name), dumped[name])
            for name, field in type(self).model_fields.items()
            if NotIdentity not in field.metadata
        }


def _identity_value(value: Any, dumped: Any) -> Any:
    if isinstance(value, Model):
        return value.identity_fields()
    if isinstance(value, list | tuple):
        return [_identity_value(item, item_dump) for item, item_dump in zip(value, dumped, strict=True)]
    if isinstance(value, Mapping):
        return {str(key): _identity_value(item, dumped[str(key)]) for key, item in value.items()}
    return dumped


def canonical_json(value: Any) -> bytes:
    """Encode a JSON value in one way only: keys sorted, no spaces, UTF-8, no NaN (raises `ValueError`)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, as 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


__all__ = ["Field", "Mistake", "Model", "NotIdentity", "Place", "PositiveInt", "Sha256", "canonical_json", "digest"]
