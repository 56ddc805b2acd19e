"""Commands that start, look at and stop the services of this machine: `services up`, `services status`, `services down`."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.console import errors, output
from flows.cli.options import LostAfter
from flows.environment import SILENT_SECONDS
from schemas.errors import RunFailed

if TYPE_CHECKING:
    from flows.services import Ask

FOLDER = Path("services")
Folder = Annotated[Path, typer.Option("--folder", help="Where data, logs and credentials lie.")]


def register(app: typer.Typer) -> None:
    """Add the group of commands."""
    group = typer.Typer(
        name="services", help="A Prefect server, an object store and workers on this machine.", no_args_is_help=True, rich_markup_mode=None
    )
    group.command()(up)
    group.command()(status)
    group.command()(down)
    app.add_typer(group)


def up(
    *,
    folder: Folder = FOLDER,
    port: Annotated[int, typer.Option(help="Of Prefect's server and its UI.", min=1, max=65535)] = 4200,
    database: Annotated[str | None, typer.Option(metavar="URL", help="postgresql+asyncpg://... Default: SQLite in the folder.")] = None,
    store: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="A store that is there already. Default: SeaweedFS is started.")
    ] = None,
    pool: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=TEMPLATE[:cuda]", help="A pool with a worker; may be repeated. Default: cpu and gpu, without a GPU."),
    ] = None,
    slots: Annotated[int, typer.Option(help="Runs at a time on each worker.", min=1)] = 1,
    lost_after: LostAfter = SILENT_SECONDS,
    detach: Annotated[bool, typer.Option("--detach", help="Return once all is healthy, and leave it running.")] = False,
) -> None:
    """Start a Prefect server, an object store, and a worker for each pool, with all deployments. Ctrl-C or `services down` stops them."""
    from flows.services import Ask, run_services

    ask = Ask(folder.absolute(), port, database, store, tuple(pool or Ask.pools), slots, lost_after)
    if detach:
        _start_detached(ask)
        return
    run_services(ask, partial(_tell, ask))


def status(folder: Folder = FOLDER) -> None:
    """Ask each service whether it works. Exit code 1 when one does not."""
    from flows.services import health

    found = health(folder.absolute())
    for name, healthy in found.items():
        output.print(f"{name}: {'healthy' if healthy else 'does not answer'}")
    silent = [name for name, healthy in found.items() if not healthy]
    if silent:
        raise RunFailed(f"{', '.join(silent)}: see {folder / 'logs'}")


def down(folder: Folder = FOLDER) -> None:
    """Stop the services, the workers first; runs save their checkpoints."""
    from flows.services import stop_services

    stop_services(folder.absolute())
    output.print(f"{folder}: stopped")


def _tell(ask: "Ask") -> None:
    output.print(f"UI:   {ask.url.removesuffix('/api')}\nlogs: {ask.folder / 'logs'}\nuse:  source {ask.folder / 'environment'}")


def _start_detached(ask: "Ask") -> None:
    from flows.services import forget_ended, is_up

    arguments = [argument for argument in sys.argv[1:] if argument != "--detach"]
    forget_ended(ask.folder)
    (ask.folder / "logs").mkdir(exist_ok=True)
    path = ask.folder / "logs" / "services.log"
    with path.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", "from flows.cli import main; main()", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ,
        )
    while not is_up(ask.folder):
        try:
            code = process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
        errors.print(path.read_text(errors="replace")[-2000:])
        raise RunFailed(f"services: ended with exit code {code}; see {path}")
    _tell(ask)
