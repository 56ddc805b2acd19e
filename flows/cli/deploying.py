"""Commands that bring flows to a Prefect server and run what it schedules: `serve`, `deploy`, `worker`."""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import output
from flows.cli.options import LostAfter
from flows.environment import SILENT_SECONDS
from schemas.errors import BadInput
from schemas.loading import load_recipe


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(serve)
    app.command()(deploy)
    app.command()(worker)


def serve(limit: Annotated[int, typer.Option(help="Runs at a time.", min=1)] = 1) -> None:
    """Offer the chain, the smoke flow and every single stage to the Prefect server of PREFECT_API_URL, and run here what it starts."""
    _require_server()
    from flows.serve import serve_flows

    serve_flows(limit)


def deploy(
    *,
    pool: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=TEMPLATE[:cuda]", help="A work pool; may be repeated. Default: cpu=process and gpu=process:cuda."),
    ] = None,
    limit: Annotated[list[str] | None, typer.Option(metavar="NAME=COUNT", help="Runs at a time in a pool, over all its workers.")] = None,
    lost_after: LostAfter = SILENT_SECONDS,
    schedule: Annotated[
        list[Path] | None, typer.Option(metavar="RECIPE", help="Run the chain of this recipe by its section schedule; may be repeated.")
    ] = None,
    nightly_smoke: Annotated[
        bool, typer.Option("--nightly-smoke", help="Run the smoke flow at 3:00 UTC. Else its schedule is off.")
    ] = False,
    notify: Annotated[
        str | None, typer.Option(metavar="URL", help="Post a message there for every failure and every alarm of a training.")
    ] = None,
) -> None:
    """Make work pools, and a deployment of the chain and of every single stage on them, on the Prefect server of PREFECT_API_URL."""
    _require_server()
    from flows.deployments import deploy as make
    from flows.deployments import parse_limits
    from flows.pools import DEFAULT_POOLS, Pool

    pools = [Pool.parse(text) for text in pool or DEFAULT_POOLS]
    recipes = [load_recipe(path) for path in schedule or ()]
    for name in make(pools, parse_limits(limit or []), lost_after, scheduled=recipes, nightly=nightly_smoke, notified=notify):
        output.print(name)


def worker(
    pool: Annotated[str, typer.Argument(metavar="POOL", help="Work pool, such as cpu or gpu.")],
    limit: Annotated[int, typer.Option(help="Runs at a time. Stages that train want a device to themselves.", min=1)] = 1,
    name: Annotated[str | None, typer.Option(help="Name of the worker in the UI.")] = None,
) -> None:
    """Run on this machine what a process pool schedules, each run as a process of this Python environment."""
    _require_server()
    if not os.environ.get("DISTILL_STORE_ADDRESS"):
        raise BadInput(
            "DISTILL_STORE_ADDRESS: not set; expected the store that all workers share, such as s3://bucket/prefix or file:///folder: "
            "a run is started in a temporary folder, where a relative one would be lost"
        )
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # of the pool's command: python
    # Ignored by what a script puts in the background; and Prefect's worker makes SIGINT of SIGTERM.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    named = ["--name", name] if name else []
    import flows.process_worker  # noqa: F401 - registers itself for the type

    sys.argv = ["prefect", "worker", "start", "--pool", pool, "--type", "process", "--limit", str(limit), *named]
    runpy.run_module("prefect", run_name="__main__")  # its own command, which handles signals too


def _require_server() -> None:
    from flows.environment import server_is_configured

    if not server_is_configured():
        raise BadInput(
            "PREFECT_API_URL: not set; expected the address of a server, such as the http://127.0.0.1:4200/api of: prefect server start"
        )
