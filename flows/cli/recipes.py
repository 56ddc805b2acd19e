"""Commands that look at recipes and run nothing: `plan`, `schema`."""

import json
from typing import Annotated

import typer
from rich.table import Table

from flows.cli.console import output
from flows.cli.options import Overrides, RecipeFile, Store


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(plan)
    app.command()(schema)


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    store: Store = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON instead of a table.")] = False,
) -> None:
    """List the stage runs of a recipe: which are done, what would run, and what encode takes on disk."""
    from flows.preparation import open_store, remembered_digest
    from schemas.loading import load_recipe
    from stages.encode_cost import encode_cost
    from stages.plan import make_plan
    from stages.runner import find_complete

    parsed = load_recipe(recipe, overrides or ())
    opened = open_store(store)
    planned = make_plan(parsed, remembered_digest)
    found = {node.name: find_complete(opened, planned.identities[node.name]) for node in planned.nodes}
    done = {name: manifest is not None for name, manifest in found.items()}
    cost = encode_cost(planned, found.get, opened)
    if as_json:
        rows = [
            {
                "name": node.name,
                "stage": node.stage,
                "identity": planned.identities[node.name],
                "inputs": dict(planned.input_digests[node.name]),
                "done": done[node.name],
            }
            for node in planned.nodes
        ]
        report = {"recipe": parsed.name, "store": opened.address, "stages": rows, "encode": cost.as_json()}
        output.out(json.dumps(report, indent=2))
        return
    table = Table("stage", "identity", "", title=f"{parsed.name} on {opened.address}")
    for node in planned.nodes:
        table.add_row(node.name, planned.identities[node.name][:12], "done" if done[node.name] else "would run")
    output.print(table)
    output.print(cost.sentence(), highlight=False)


def schema() -> None:
    """Write the JSON Schema of recipes, so that an editor completes and checks them."""
    from schemas.recipe import Recipe

    output.out(json.dumps(Recipe.model_json_schema(), indent=2))
