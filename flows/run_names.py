"""Names of flow runs, from their parameters."""

from pathlib import Path
from typing import Any

from prefect.runtime import flow_run

from flows.preparation import is_recipe_text
from schemas.errors import BadInput
from schemas.loading import read_recipe
from schemas.recipe import Recipe


def recipe_run_name() -> str:
    """Return the recipe's name."""
    return _recipe_name(flow_run.parameters)


def stage_run_name() -> str:
    """Return the recipe's name, the stage run's, and the share."""
    share = flow_run.parameters.get("share")
    name = f"{_recipe_name(flow_run.parameters)} {flow_run.parameters.get('run') or flow_run.flow_name}"
    return name if share is None else f"{name} {share}"


def _recipe_name(parameters: dict[str, Any]) -> str:
    recipe = parameters.get("recipe")
    if isinstance(recipe, Recipe):
        return recipe.name
    if isinstance(recipe, dict):
        return str(recipe.get("name", "recipe"))
    if isinstance(recipe, str):
        return _named(recipe) if is_recipe_text(recipe) else Path(recipe).stem
    return "tiny"


def _named(text: str) -> str:
    try:
        return read_recipe(text).name
    except BadInput:  # the run itself says why
        return "recipe"
