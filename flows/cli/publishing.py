"""The command that hands a published model out: `publish`."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import output
from flows.cli.options import Store


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(publish)


def publish(
    published: Annotated[str, typer.Argument(metavar="PUBLISHED", help="Published model: a folder, or an artifact on the store.")],
    *,
    to: Annotated[
        str, typer.Option("--to", metavar="PLACE", help="A folder, s3://bucket/prefix, or hub:owner/name (token from HF_TOKEN).")
    ],
    private: Annotated[bool, typer.Option("--private", help="Of a repository that is made on the hub.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Look at all, list what would go, and send nothing.")] = False,
    store: Store = None,
) -> None:
    """Hand a published model out: to a folder, to object storage, or to the Hugging Face hub."""
    from flows.preparation import open_store
    from flows.texts import size
    from infra.settings import Settings
    from stages.publish.handing_out import prepare_handing_out
    from stages.sample import open_published

    folder = open_published(published, None if Path(published).is_dir() else open_store(store))
    prepared = prepare_handing_out(folder, to, Settings.load().store, private=private)
    if dry_run:
        for path, count in zip(prepared.files, prepared.sizes, strict=True):
            output.print(f"{size(count):>10}  {path.as_posix()}")
    else:
        output.print(prepared.send())
    verb = "would go" if dry_run else "went"
    output.print(f"{len(prepared.files)} files, {size(sum(prepared.sizes))}, {verb} to {prepared.where}")
