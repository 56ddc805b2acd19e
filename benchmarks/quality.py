"""Quality of students against their teacher: `python -m benchmarks.quality [--folder demo/adversarial] [--images 512] [--make]`.

The students are those of `RECIPES`, which `distill demo --recipe tiny-adversarial.yaml` and `--make` leave on the store, so that the table costs
sampling only; a student that is not there is an error that says so. All are drawn from the same prompts and noise, with the teacher at several step
counts beside them, and measured by the stage `evaluate` itself, which keeps every row: a second call prints at once. The last line is JSON, `rows`:
for each its `method`, its `steps`, the FID to other samples of the teacher (`fid_teacher`), to the real images (`fid_real`), and where its student
comes from (`student`).
"""

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

from flows.demo import DEMOS, PROJECT, run_on_drawn
from flows.preparation import prepare
from infra.store import ArtifactStore
from schemas.errors import DistillError, RunFailed
from schemas.loading import load_recipe
from schemas.manifest import Evaluation, Manifest, StudentLoRA, StudentUNet
from schemas.recipe import Recipe
from stages.evaluate.rows import TEACHER, families_of
from stages.plan import Node, Plan, identity_of
from stages.runner import Surroundings, execute

logger = logging.getLogger(__name__)

RECIPES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "": ("tiny-adversarial.yaml", ()),
    "mse": ("tiny-adversarial.yaml", ("lightning.adversarial=null", "lcm=null")),
}
"""Recipe and overrides by the prefix that its students get in the table. The second is the same chain with the squared error on all links."""

NO_TABLE = ("evaluate=null", "publish=null")


def students(store: str, folder: Path, *, make: bool) -> tuple[Recipe, dict[str, Manifest], dict[str, Manifest]]:
    """Return the first recipe, the artifacts that an evaluation reads beside students, and the students of all recipes by their name in the table.

    Raises `RunFailed` naming those that are missing, unless they are to be made.
    """
    found: dict[str, Manifest] = {}
    missing: list[str] = []
    shared: dict[str, Manifest] = {}
    first: Recipe | None = None
    for prefix, (name, overrides) in RECIPES.items():
        recipe = load_recipe(PROJECT / "recipes" / name, [f"ingest.table={folder / 'urls.parquet'}", *overrides])
        first = first or recipe
        if make:
            run_on_drawn(name, folder, (*overrides, *NO_TABLE))
        prepared = prepare(recipe, store)
        node = prepared.plan.node("evaluate")
        for upstream in node.upstream():
            manifest = prepared.surroundings.store.find(prepared.plan.identities[upstream])
            if manifest is None:
                missing.append(f"{upstream} of {name} {' '.join(overrides)}")
            elif isinstance(manifest.content, StudentUNet | StudentLoRA):
                found["-".join(filter(None, (prefix, upstream)))] = manifest
            else:
                shared[upstream] = manifest
    if missing:
        raise RunFailed(f"{store}: lacks {'; '.join(missing)}; make them with: python -m benchmarks.quality --make")
    assert first is not None, "there are recipes"
    return first, shared, found


def evaluation(
    store: ArtifactStore, recipe: Recipe, shared: Mapping[str, Manifest], found: Mapping[str, Manifest], images: int
) -> Manifest:
    """Measure all students in one run of the stage `evaluate`, or find that it was done."""
    assert recipe.evaluate is not None, "the recipe measures"
    config = recipe.evaluate.model_copy(update={"prompt_count": images})
    inputs = {"teacher": "teacher", "latents": "encode", "images": "ingest", "selection": "select", "students": tuple(found)}
    node = Node("quality", "evaluate", config, recipe.seed, inputs)
    everything = {**shared, **found}
    digests = {field: shared[source].identity for field, source in inputs.items() if isinstance(source, str)}
    digests |= {f"students.{name}": manifest.identity for name, manifest in found.items()}
    identities = {name: manifest.identity for name, manifest in everything.items()} | {node.name: identity_of(node, digests)}
    plan = Plan(recipe, (node,), identities, {node.name: digests} | {name: {} for name in everything})
    return execute(plan, node, Surroundings(store), everything)


def table(measured: Manifest, found: Mapping[str, Manifest]) -> list[dict[str, object]]:
    """Rows of the table, in the order of the evaluation; those of `evaluate.transfer`, which are measured on other teachers, are none of it."""
    assert isinstance(measured.content, Evaluation)
    families = {TEACHER: TEACHER, **families_of(found)}
    rows: list[dict[str, object]] = []
    for name, scores in measured.content.scores.items():
        if "fid_real" not in scores:
            continue
        model, _, steps = name.rpartition("@")
        rows.append({"method": families[model], "steps": int(steps), **scores, "student": model})
    return rows


def main() -> None:
    """Print the table."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=DEMOS["tiny-adversarial.yaml"].folder, help="where the demo's pictures and store lie"
    )
    parser.add_argument("--images", type=int, default=512, help="images of a row")
    parser.add_argument("--make", action="store_true", help="make the students that are missing first: hours on two cores")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    store = f"file://{folder / 'store'}"
    try:
        recipe, shared, found = students(store, folder, make=arguments.make)
        measured = evaluation(ArtifactStore.open(store), recipe, shared, found, arguments.images)
    except DistillError as error:
        sys.exit(f"error: {error}")
    rows = table(measured, found)
    lines = [f"{row['method']:<24} {row['steps']:>3} {row['fid_teacher']:>10.1f} {row['fid_real']:>8.1f}  {row['student']}" for row in rows]
    print("\n".join([f"{'method':<24} {'steps':>3} {'to teacher':>8} {'to real':>8}  student", *lines]))  # noqa: T201
    print(json.dumps({"rows": rows, "images": arguments.images}))  # noqa: T201


if __name__ == "__main__":
    main()
