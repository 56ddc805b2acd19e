"""Quality of students against their teacher: `python -m benchmarks.quality [--tables lightning dmd] [--images 512] [--make]`.

The students are those of `TABLES`, which `--make` leaves on the store, so that a table costs sampling only; a student that is not there is an error
that says so. All are drawn from the same prompts and noise, with the teacher at several step counts beside them, and measured by the stage `evaluate`
itself, which keeps every row: a second call prints at once. The last line is JSON, `rows`: for each its `table`, its `method`, its `steps`, the FID
to other samples of the teacher (`fid_teacher`), to the real images (`fid_real`), and where its student comes from (`student`).
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

Students = Mapping[str, tuple[str, tuple[str, ...]]]
"""Recipe and overrides by the prefix that its students get in the table."""

MSE = ("lightning.adversarial=null", "lcm=null")
"""The same chain with the squared error on all links."""
DMD2 = ("dmd.regression=null", "dmd.fake_updates=5", "dmd.gan={}", "dmd.training_steps=150")
LPIPS = ("dmd.regression={distance: lpips-efficientnet-lite0, weight: 0.25}",)
"""The form of the papers' distance, through the network whose features FID is measured in: that favours regression."""
TABLES: Mapping[str, Students] = {
    "lightning": {
        "": ("tiny-adversarial.yaml", ()),
        "mse": ("tiny-adversarial.yaml", MSE),
        # whether it is the switch to x0 that helps one step, or the discriminator
        "mse-x0": ("tiny-adversarial.yaml", (*MSE, "lightning.links.1={prediction: sample, conversion_steps: 1000}")),
    },
    "dmd": {
        "": ("tiny-dmd.yaml", ()),
        # twice the batch: with regression each pair's output is matched beside a fresh one
        "no-regression": ("tiny-dmd.yaml", ("dmd.regression=null", "dmd.batch_size=16")),
        "regression-alone": ("tiny-dmd.yaml", ("dmd.matching=false",)),
        "lpips": ("tiny-dmd.yaml", LPIPS),
        "lpips-regression-alone": ("tiny-dmd.yaml", (*LPIPS, "dmd.matching=false")),
        "dmd2": ("tiny-dmd.yaml", DMD2),
        "dmd2-4-steps": ("tiny-dmd.yaml", (*DMD2, "dmd.warm_up=null", "dmd.steps=4")),
        # on the same drawings and teacher, so that its rows are those of the other table
        "chain": ("tiny-adversarial.yaml", ("lcm=null",)),
    },
}
"""Students by table. The first recipe of each says how all of it are measured."""

NO_TABLE = ("evaluate=null", "publish=null")


def students(table: str, store: str, folder: Path, *, make: bool) -> tuple[Recipe, dict[str, Manifest], dict[str, Manifest]]:
    """Return the table's first recipe, the artifacts that an evaluation reads beside students, and the students by their name in the table.

    Raises `RunFailed` naming those that are missing, unless they are to be made.
    """
    found: dict[str, Manifest] = {}
    missing: list[str] = []
    shared: dict[str, Manifest] = {}
    first: Recipe | None = None
    for prefix, (name, overrides) in TABLES[table].items():
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
                if manifest.identity not in {one.identity for one in found.values()}:
                    found["-".join(filter(None, (prefix, upstream)))] = manifest
            else:
                shared[upstream] = manifest
    if missing:
        raise RunFailed(f"{store}: lacks {'; '.join(missing)}; make them with: python -m benchmarks.quality --tables {table} --make")
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


def rows_of(measured: Manifest, found: Mapping[str, Manifest]) -> list[dict[str, object]]:
    """Rows of a table, in the order of the evaluation; those of `evaluate.transfer`, which are measured on other teachers, are none of it."""
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
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    store = f"file://{folder / 'store'}"
    rows: list[dict[str, object]] = []
    for table in arguments.tables:
        try:
            recipe, shared, found = students(table, store, folder, make=arguments.make)
            measured = evaluation(ArtifactStore.open(store), recipe, shared, found, arguments.images)
        except DistillError as error:
            sys.exit(f"error: {error}")
        own = rows_of(measured, found)
        lines = [
            f"{row['method']:<24} {row['steps']:>3} {row['fid_teacher']:>10.1f} {row['fid_real']:>8.1f}  {row['student']}" for row in own
        ]
        print("\n".join([f"{table:<24} {'steps':>3} {'to teacher':>8} {'to real':>8}  student", *lines]))  # noqa: T201
        rows += [{"table": table} | row for row in own]
    print(json.dumps({"rows": rows, "images": arguments.images}))  # noqa: T201


if __name__ == "__main__":
    main()
