"""Errors that carry one clear sentence for the person who can act on it.

`BadInput` is the user's to mend (exit code 2) and is raised before costly work; `RunFailed` is a run that could not go on (exit code 1).
Only `Transient` may be retried: the same call may pass later.
"""


class DistillError(Exception):
    """Base of all errors the project raises on purpose."""


class BadInput(DistillError):
    """A recipe, table, teacher, address or argument is wrong. The message says what, where and what was expected."""


class RunFailed(DistillError):
    """A run met a condition it must not go on from (too many failed downloads, NaN in a loss, a full disk)."""


class GateNotMet(RunFailed):
    """A figure of an artifact is outside the bounds of a gate of the recipe. The message says how to go on all the same."""


class CorruptArtifact(RunFailed):
    """Bytes on the store differ from what the manifest promises. Where the artifact's identity is known, the message says how to mend it."""

    def __init__(self, message: str, identity: str | None = None) -> None:
        mend = "" if identity is None else f"\nto have it made again: distill verify {identity[:16]} --remove, then run its recipe"
        super().__init__(message + mend)
        self.identity = identity


class Transient(DistillError):
    """A network or store failure that may pass: retried with backoff, and safe to retry from outside."""


class StoreUnreachable(BadInput, Transient):
    """Nothing answers at the store's address: wrong, for the person who has just given it; gone for a while, for a run that the server starts."""
