"""What an artifact was made from, back to the files that came from elsewhere, as plain data for pages."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from schemas.manifest import Manifest

Find = Callable[[str], Manifest | None]
"""A store's own: the manifest of an identity, None where it has none."""

Row = dict[str, Any]
"""`node`, `kind`, `identity`, `stage`, `revision`, and `inputs`: digests by name, of artifacts and of files from elsewhere."""


def ancestors(nearest: Iterable[Manifest[Any]], find: Find) -> list[Manifest[Any]]:
    """The artifacts given and all that they follow from, each after what it was made from.

    One that is no longer on the store ends its line, as a file from elsewhere does. No manifest's figures of cost, host or time are used here.
    """
    order: dict[str, Manifest[Any]] = {}

    def visit(manifest: Manifest[Any]) -> None:
        if manifest.identity in order:
            return
        for identity in manifest.lineage.inputs.values():
            before = None if identity in order else find(identity)
            if before is not None:
                visit(before)
        order[manifest.identity] = manifest

    for manifest in nearest:
        visit(manifest)
    return list(order.values())


def lineage_row(manifest: Manifest[Any]) -> Row:
    """One artifact."""
    lineage = manifest.lineage
    return {
        "node": lineage.node,
        "kind": manifest.kind,
        "identity": manifest.identity,
        "stage": lineage.stage,
        "revision": lineage.revision,
        "inputs": dict(lineage.inputs),
    }


def outside(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Digest and name of what the artifacts read that is none of them, in the order in which it is first read."""
    made = {row["identity"] for row in rows}
    found: dict[str, str] = {}
    for row in rows:
        for name, identity in row["inputs"].items():
            if identity not in made:
                found.setdefault(identity, name.rpartition(".")[2])
    return list(found.items())
