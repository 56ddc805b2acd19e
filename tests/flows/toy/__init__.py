"""A chain of five small real stages in the places of ingest, measure, select, teacher and encode: the orchestration's tests need no networks.

What the stages should do beside their work is read from the folder `TOY_FOLDER`: `<stage>.fail` holds the name of an error and how often to raise it,
`encode.seconds` the time that a step of encode takes, in the place of `TOY_SECONDS`.
Every run of a body adds a line to `runs.log` there.
"""

import os
from dataclasses import replace
from pathlib import Path

from schemas import errors
from stages.registry import STAGES

NAMES = ("ingest", "measure", "select", "teacher", "encode")


def install() -> None:
    """Put the toys in the registry of this process."""
    for name in NAMES:
        STAGES[name] = replace(STAGES[name], module=f"tests.flows.toy.{name}")


def folder() -> Path:
    return Path(os.environ["TOY_FOLDER"])


def note_run(stage: str) -> None:
    """Write the run down, and fail where the test wants it."""
    with (folder() / "runs.log").open("a") as log:
        log.write(f"{stage}\n")
    order = folder() / f"{stage}.fail"
    if not order.exists():
        return
    name, _, times = order.read_text().partition(" ")
    if int(times) > 1:
        order.write_text(f"{name} {int(times) - 1}")
    else:
        order.unlink()
    raise {"Transient": errors.Transient, "BadInput": errors.BadInput, "RunFailed": errors.RunFailed}.get(name, ZeroDivisionError)(
        f"{stage} was told to"
    )
