"""From what a person gave (a recipe, a store, a device) to a plan and its surroundings, refused before any work where it cannot go well."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from infra.outside import content_digest
from infra.progress import Progress
from infra.settings import Settings
from infra.store import ArtifactStore
from schemas.errors import BadInput
from schemas.loading import load_recipe, read_recipe
from schemas.manifest import Manifest
from schemas.recipe import Recipe
from stages.gates import check_gates, gates_after
from stages.plan import Node, Plan, find_node, make_plan, nodes_of
from stages.preflight import preflight, unfinished
from stages.runner import Surroundings

ProgressOf = Callable[[Node], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class Prepared:
    """All that a run needs, looked at and found usable."""

    plan: Plan
    surroundings: Surroundings
    unfinished: tuple[Node, ...]
    """Stage runs whose artifact is not on the store yet."""


def open_store(address: str | None = None) -> ArtifactStore:
    """Open the store at `address`, or where `DISTILL_STORE_ADDRESS` says. Raises `BadInput` when it cannot be read and written."""
    settings = Settings.load()
    return ArtifactStore.open(address or settings.store_address, settings.store)


def as_recipe(recipe: Recipe | str) -> Recipe:
    """Return the recipe itself, the one in the file of that path, or the one that the text is. Raises `BadInput`."""
    if isinstance(recipe, Recipe):
        return recipe
    return read_recipe(recipe) if is_recipe_text(recipe) else load_recipe(Path(recipe))


def is_recipe_text(recipe: str) -> bool:
    """Whether it is a recipe's text, YAML or JSON, and not the path of its file."""
    return "\n" in recipe or recipe.lstrip().startswith("{")


def prepare(
    recipe: Recipe | str,
    store: str | None = None,
    device: str | None = None,
    *,
    progress: ProgressOf | None = None,
    only: str | None = None,
    until: str | None = None,
    inputs: Mapping[str, str] | None = None,
    elsewhere: Collection[str] = (),
) -> Prepared:
    """Plan the recipe, open the store, and check everything that can be checked before work begins. Raises `BadInput`.

    `only` names the one stage that is meant to run, `until` the last of those that are; `inputs` are artifacts to read (references, or
    `latest:recipe` for the newest that the same run of another recipe made), by the name of the run whose place they take.
    Stages of the sections `elsewhere` will run on other machines, whose devices and packages are theirs to check.
    """
    recipe = as_recipe(recipe)
    nodes = nodes_of(recipe)
    target = None if only is None else find_node(nodes, only)
    check_gates(recipe.gates if target is None else gates_after(recipe.gates, target.name), nodes)
    found = open_store(store)
    given: dict[str, str] = {}
    for name, reference in (inputs or {}).items():
        upstream = _upstream(nodes, target, name)
        given[upstream] = find_artifact(found, upstream, reference).identity
    last = target if until is None else find_node(nodes, until)
    plan = make_plan(recipe, remembered_digest, given, last)
    settings = Settings.load()
    surroundings = Surroundings(
        store=found,
        device=device or settings.device,
        share_devices=settings.share_devices,
        tensorboard=settings.tensorboard,
    )
    if progress is not None:
        surroundings = replace(surroundings, progress=progress)
    left = tuple(node for node in unfinished(plan, surroundings) if target in (None, node))
    preflight([node for node in left if node.section not in elsewhere], plan, surroundings)
    return Prepared(plan, surroundings, left)


def _upstream(nodes: Sequence[Node], target: Node | None, name: str) -> str:
    """Return the run that an input's name means: a run of the plan, or a field of the target stage's inputs."""
    source = None if target is None else target.inputs.get(name)
    if isinstance(source, str):
        return source
    names = [node.name for node in nodes] if target is None else list(target.upstream())
    if name not in names:
        fields = [] if target is None else [field for field, source in target.inputs.items() if isinstance(source, str)]
        raise BadInput(f"input {name!r}: is read by nothing here; expected one of {', '.join(dict.fromkeys([*fields, *names])) or 'none'}")
    return name


def find_artifact(store: ArtifactStore, node: str, reference: str) -> Manifest:
    """Return the artifact that a reference means, or with `latest:recipe` the newest of that recipe's run `node`. Raises `BadInput`."""
    kind, separator, recipe = reference.partition(":")
    if kind != "latest" or not separator or "/" in recipe:
        return store.resolve(reference)
    return store.latest(recipe, node)


def remembered_digest(address: str) -> str:
    """Content digest of what lies at `address`, computed once a process as long as names, sizes and times of the files stay."""
    return _digest(address, _stamp(address))


@cache
def _digest(address: str, stamp: object) -> str:  # noqa: ARG001 - the cache tells by it whether the files are still the same
    return content_digest(address)


def _stamp(address: str) -> object:
    path = Path(address.removeprefix("file://"))
    if "://" in str(path) or not path.exists():
        return object()  # elsewhere: looked at each time
    files = [path] if path.is_file() else sorted(Path(folder) / name for folder, _, names in os.walk(path) for name in names)
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns, file.stat().st_ino) for file in files if file.exists())
