"""Commands that look at recipes and run nothing: `plan`, `report`, `schema`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from flows.cli.console import output
from flows.cli.options import Overrides, RecipeFile, Store

if TYPE_CHECKING:
    from infra.store import ArtifactStore
    from schemas.manifest import Manifest
    from stages.memory_estimate import MemoryEstimate
    from stages.plan import Plan


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(plan)
    app.command()(report)
    app.command()(schema)


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    store: Store = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="Time a pass of the teacher there (cpu, cuda, cuda:0, mps), for the hours that pairs takes."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON instead of a table.")] = False,
) -> None:
    """List the stage runs of a recipe: which are done, what would run, what encode and pairs take and training in a device's memory."""
    from flows.preparation import open_store, remembered_digest
    from schemas.loading import load_recipe
    from stages.encode_cost import encode_cost
    from stages.encoded_size import human
    from stages.gates import check_gates
    from stages.pairs_cost import pairs_cost
    from stages.plan import make_plan
    from stages.preflight import check_device
    from stages.runner import find_complete

    if device is not None:
        check_device(device)
    parsed = load_recipe(recipe, overrides or ())
    opened = open_store(store)
    planned = make_plan(parsed, remembered_digest)
    check_gates(parsed.gates, planned.nodes)
    found = {node.name: find_complete(opened, planned.identities[node.name]) for node in planned.nodes}
    done = {name: manifest is not None for name, manifest in found.items()}
    cost = encode_cost(planned, found.get, opened)
    drawing = pairs_cost(planned, found.get, opened, cost.size, device)
    memory, line = _memory(planned, found, opened)
    if as_json:
        rows = [
            {
                "name": node.name,
                "stage": node.stage,
                "identity": planned.identities[node.name],
                "inputs": dict(planned.input_digests[node.name]),
                "done": done[node.name],
                "memory": memory[node.name].as_json() if node.name in memory else None,
            }
            for node in planned.nodes
        ]
        pairs = None if drawing is None else drawing.as_json()
        report = {"recipe": parsed.name, "store": opened.address, "stages": rows, "encode": cost.as_json(), "pairs": pairs}
        output.out(json.dumps(report, indent=2))
        return
    table = Table("stage", "identity", "", "memory", title=f"{parsed.name} on {opened.address}")
    for node in planned.nodes:
        table.add_row(
            node.name,
            planned.identities[node.name][:12],
            "done" if done[node.name] else "would run",
            human(memory[node.name].peak) if node.name in memory else "",
        )
    output.print(table)
    output.print(cost.sentence(), highlight=False)
    if drawing is not None:
        output.print(drawing.sentence(), highlight=False)
    if line:
        output.print(line, highlight=False)


def _memory(planned: "Plan", found: "Mapping[str, Manifest | None]", store: "ArtifactStore") -> "tuple[Mapping[str, MemoryEstimate], str]":
    """Estimates of the training that is left, by run, and what to say of them. Only then is torch needed to plan."""
    from schemas.training import TrainingConfig

    if not any(isinstance(node.config, TrainingConfig) and found[node.name] is None for node in planned.nodes):
        return {}, ""
    from stages.memory_estimate import memory_estimates, sentence

    estimates = memory_estimates(planned, found.get, store)
    return estimates or {}, sentence(estimates)


def report(
    recipe: RecipeFile,
    overrides: Overrides = None,
    store: Store = None,
    to: Annotated[Path, typer.Option("--output", metavar="FILE", help="Where to write the page.")] = Path("report.html"),
) -> None:
    """Write the report of a recipe that has run: the evaluation's page, with the cost of every stage and how to make it again."""
    from flows.preparation import open_store, remembered_digest
    from flows.report import planned_report
    from schemas.loading import load_recipe
    from stages.plan import make_plan

    page = planned_report(make_plan(load_recipe(recipe, overrides or ()), remembered_digest), open_store(store))
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(page, encoding="utf-8")
    output.print(f"report: {to}")


def schema() -> None:
    """Write the JSON Schema of recipes, so that an editor completes and checks them."""
    from schemas.recipe import Recipe

    output.out(json.dumps(Recipe.model_json_schema(), indent=2))
