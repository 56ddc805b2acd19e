"""Commands that make artifacts: `run`, `stage`, `demo`."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from flows.cli.console import output
from flows.cli.options import Also, Device, Overrides, PassGate, RecipeFile, Store, with_also
from infra.progress import Progress, local_progress
from infra.store import ArtifactStore
from schemas.errors import BadInput
from schemas.loading import load_recipe
from schemas.manifest import Evaluation, Manifest, PublishedModel, Selection
from schemas.share import Share
from stages.plan import Node


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(run)
    app.command()(stage)
    app.command()(demo)


def run(
    recipe: RecipeFile,
    *,
    overrides: Overrides = None,
    also: Also = None,
    store: Store = None,
    device: Device = None,
    pass_gate: PassGate = None,
) -> None:
    """Run a whole recipe. What is finished is skipped, what was interrupted goes on."""
    from flows.local import run_here

    finished = run_here(load_recipe(recipe, with_also(overrides, also)), store, device, tuple(pass_gate or ()))
    print_chain(finished.manifests, finished.made, finished.store)


def stage(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Stage, or one of its runs such as lightning-8-4.")],
    recipe: RecipeFile,
    *,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input", metavar="NAME=ARTIFACT", help="Read this artifact (or latest:RECIPE) instead of the recipe's; may be repeated."
        ),
    ] = None,
    overrides: Overrides = None,
    also: Also = None,
    store: Store = None,
    device: Device = None,
    share: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER/SHARES", help="Make only this share of its shards, beside others; of pairs. Then run it without, once."
        ),
    ] = None,
    pass_gate: PassGate = None,
) -> None:
    """Run one stage of a recipe alone, without Prefect. Its inputs are found on the store by identity, or given."""
    from flows.preparation import prepare
    from stages.gates import check_passes, go_through_gates
    from stages.runner import execute, execute_share

    part = None if share is None else Share.parse(share)
    parsed = load_recipe(recipe, with_also(overrides, also))
    passed = tuple(pass_gate or ())
    check_passes(passed, parsed.gates)
    prepared = prepare(parsed, store, device, progress=_progress, only=name, inputs=_given(inputs or ()))
    node = prepared.plan.node(name)
    if part is not None:
        execute_share(prepared.plan, node, prepared.surroundings, part)
        output.print(f"share {part} of {name} is made")
        return
    manifest = execute(prepared.plan, node, prepared.surroundings)
    print_chain({node.name: manifest}, {left.name for left in prepared.unfinished}, prepared.surroundings.store)
    go_through_gates(parsed.gates, manifest, prepared.surroundings.store, passed)


def demo(
    *,
    recipe: Annotated[str, typer.Option(help="Or a longer one: tiny-adversarial.yaml, tiny-teacher.yaml.")] = "tiny.yaml",
    folder: Annotated[
        Path | None, typer.Option(help="Where pictures, store, report and model go: demo, and a folder in it for a longer recipe.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Run a tiny recipe on real captioned pictures, served and fetched on this machine, to a student and its report."""
    from flows.demo import run_demo

    shown = run_demo(recipe, folder, tuple(overrides or ()))
    print_chain(shown.finished.manifests, shown.finished.made, shown.finished.store)
    output.print(f"model:  {shown.model}\nreport: {shown.report}")


@contextmanager
def _progress(node: Node) -> Iterator[Progress]:
    with local_progress(node.name) as progress:
        yield progress


def _given(inputs: Sequence[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for item in inputs:
        name, separator, reference = item.partition("=")
        if not (separator and name and reference):
            raise BadInput(f"--input {item}: expected NAME=ARTIFACT, such as teacher=3f9ac2")
        given[name] = reference
    return given


def print_chain(manifests: Mapping[str, Manifest], made: Collection[str], store: ArtifactStore) -> None:
    """Write a line a stage run, then where the reports and the published model lie on this machine."""
    table = Table("stage", "", "artifact", "kind")
    for name, manifest in manifests.items():
        table.add_row(name, "made" if name in made else "found", manifest.identity[:12], manifest.kind)
    output.print(table)
    for manifest in manifests.values():
        if isinstance(manifest.content, Evaluation) and any(entry.path == "report.html" for entry in manifest.files):
            kept = store.report_address(manifest)  # a chain's, with what it took; a stage's run alone has left none
            output.print(
                f"report: {store.fetch(manifest, ['report.html']) / 'report.html' if kept is None else kept.removeprefix('file://')}"
            )
        if isinstance(manifest.content, Selection) and any(entry.path == "report.html" for entry in manifest.files):
            output.print(f"selection: {store.fetch(manifest, ['report.html']) / 'report.html'}")
        if isinstance(manifest.content, PublishedModel):
            output.print(f"published: {manifest.identity}")
