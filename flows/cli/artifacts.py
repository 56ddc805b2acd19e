"""Commands that look after artifacts: `show`, `verify`, `gc`."""

from datetime import timedelta
from typing import Annotated, cast

import typer
from rich.table import Table

from flows.cli.console import output
from flows.cli.options import ArtifactReference, Device, Store
from infra.store import ArtifactStore
from schemas.errors import BadInput, CorruptArtifact
from schemas.manifest import Manifest, Pairs


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(show)
    app.command()(verify)
    app.command()(gc)


def show(
    artifact: ArtifactReference,
    store: Store = None,
    file: Annotated[
        str | None, typer.Option("--file", metavar="PATH", help="Bring this file here, verified, and write where it lies.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the manifest as it is.")] = False,
) -> None:
    """Show an artifact: what it is, where it comes from, which files it has."""
    from flows.preparation import open_store

    opened = open_store(store)
    manifest = opened.resolve(artifact)
    if file is not None:
        output.out(str(opened.fetch(manifest, [file]) / file))
        return
    if as_json:
        output.out(manifest.model_dump_json(indent=2))
        return
    from flows.texts import manifest_rows, size

    table = Table(show_header=False)
    for name, value in manifest_rows(manifest).items():
        table.add_row(name, value)
    output.print(table)
    files = Table("file", "bytes", "sha256")
    for entry in manifest.files:
        files.add_row(entry.path, f"{entry.size:,}", entry.sha256[:16])
    output.print(files)
    output.print(f"{len(manifest.files)} files, {size(manifest.bytes)}, on {opened.address}")


def verify(
    artifact: ArtifactReference,
    store: Store = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Delete the artifact if it is damaged. The next run of its recipe makes it again.")
    ] = False,
    recompute: Annotated[
        int, typer.Option("--recompute", metavar="N", min=0, help="Of noise-output pairs: draw N again with the teacher, and compare.")
    ] = 0,
    device: Device = None,
) -> None:
    """Read and hash every file of an artifact again. Exit code 1 when one is damaged or missing, or a pair differs, unless it was removed."""
    from flows.preparation import open_store
    from infra.settings import Settings
    from stages.preflight import check_device

    device = device or Settings.load().device
    check_device(device)
    opened = open_store(store)
    try:
        manifest = _sound(opened, artifact)
        if recompute:
            output.print(_recomputed(opened, manifest, recompute, device))
    except CorruptArtifact as damage:
        if not remove or damage.identity is None:
            raise
        opened.remove(damage.identity)
        output.print(f"{damage.identity}: was damaged and is removed; the next run of its recipe makes it again")
    else:
        output.print(f"{manifest.identity}: {len(manifest.files)} files are as the manifest says")


def _sound(store: ArtifactStore, reference: str) -> Manifest:
    manifest = store.resolve(reference)
    problems = store.verify(manifest)
    if problems:
        what = f"artifact {manifest.identity[:12]} ({manifest.kind}) on {store.address}"
        raise CorruptArtifact(f"{what} is damaged:\n  " + "\n  ".join(problems), manifest.identity)
    return manifest


def _recomputed(store: ArtifactStore, manifest: Manifest, count: int, device: str) -> str:
    """Draw pairs again; what to say of it. Raises `BadInput` for an artifact of another kind, `CorruptArtifact` where a pair differs."""
    if not isinstance(manifest.content, Pairs):
        raise BadInput(f"--recompute: artifact {manifest.identity[:12]} is of the kind {manifest.kind}; expected pairs")
    from stages.pairs.recompute import recompute

    found = recompute(cast("Manifest[Pairs]", manifest), store, count, device)
    difference = "equal bits" if found.largest == 0 else f"outputs differ by at most {found.largest:.3g} of their norm"
    return f"{manifest.identity}: {len(found.pairs)} of {manifest.content.pairs:,} pairs drawn again: {difference}"


def gc(
    store: Store = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete. Without it, only say what would go.")] = False,
    older_than_hours: Annotated[float, typer.Option("--older-than-hours", min=0, help="Leave alone what is younger.")] = 24.0,
    keep_checkpoints: Annotated[int, typer.Option("--keep-checkpoints", min=1, help="Checkpoints to keep of each unfinished stage.")] = 2,
) -> None:
    """Find what killed runs left behind and old checkpoints; delete them with --delete. Never touches a finished artifact."""
    from flows.preparation import open_store
    from flows.texts import size

    report = open_store(store).gc(dry_run=not delete, older_than=timedelta(hours=older_than_hours), keep_checkpoints=keep_checkpoints)
    if report.items:
        table = Table("object", "bytes", "why")
        for item in report.items:
            table.add_row(item.key, f"{item.bytes:,}", item.reason)
        output.print(table)
    verb = "deleted" if delete else "would be deleted (nothing was: add --delete)"
    output.print(f"{len(report.items)} objects, {size(report.bytes)} {verb}")
