"""Names of flow runs, from their parameters."""

from pathlib import Path
from typing import Any

from prefect.runtime import flow_run

from schemas.recipe import Recipe


def recipe_run_name() -> str:
    """Return the recipe's name."""
    return _recipe_name(flow_run.parameters)


def stage_run_name() -> str:
    """Return the recipe's name and the stage run's."""
    return f"{_recipe_name(flow_run.parameters)} {flow_run.parameters.get('run') or flow_run.flow_name}"


def _recipe_name(parameters: dict[str, Any]) -> str:
    recipe = parameters.get("recipe")
    if isinstance(recipe, Recipe):
        return recipe.name
    if isinstance(recipe, dict):
        return str(recipe.get("name", "recipe"))
    return Path(recipe).stem if isinstance(recipe, str) else "tiny"
