"""The stage `evaluate`: samples of teacher and students on the same prompts and noise, their FIDs, a grid and a report."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from infra.outside import local_copy
from schemas.evaluation import EvaluateConfig
from schemas.extractors import EXTRACTOR_WEIGHTS
from schemas.manifest import Evaluation, Manifest
from schemas.recipe import Recipe
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.pipeline import TeacherPipeline
from stages.evaluate.also import Also, open_also, preflight_also
from stages.evaluate.curves import TrainingCurves, read_curves
from stages.evaluate.features import check_extractor, open_extractor
from stages.evaluate.grid import draw_grid, grid_groups
from stages.evaluate.inputs import Inputs
from stages.evaluate.past import samples_folder
from stages.evaluate.pieces import Pieces
from stages.evaluate.prompts import PromptSet, assign, read_prompts, seeded_order
from stages.evaluate.reference import read_reference
from stages.evaluate.report import GridPictures, render_report
from stages.evaluate.row_sets import RowSets
from stages.evaluate.rows import TEACHER, Row, rows_of
from stages.evaluate.samples import Sampler, first_pictures, scheduler_of
from stages.evaluate.scoring import Score, Scoring, check_scoring
from stages.evaluate.singles import Singles, check_singles
from stages.evaluate.summary import Features, Measured, Sources, summarise
from stages.evaluate.tables import write_tables
from stages.evaluate.timing import Timing, time_row
from stages.evaluate.transfer import Transfer, open_transfers, preflight_transfers, summarise_transfers
from stages.students import load_student, weight_files
from stages.training.randomness import derive_seed
from stages.workspace import Workspace


def preflight(config: EvaluateConfig, outside: Mapping[str, str], recipe: Recipe) -> None:
    """Look at the networks, and at a prompts file and checkpoints on this machine, hours before they are needed.

    Raises `BadInput`.
    """
    check_extractor(config.extractor, outside)
    preflight_transfers(config, outside)
    preflight_also(config, outside, recipe)
    if "prompts" in outside and "://" not in outside["prompts"].removeprefix("file://"):
        read_prompts(Path(outside["prompts"].removeprefix("file://")))
    check_singles(config, outside)


def run(config: EvaluateConfig, inputs: Inputs, workspace: Workspace) -> Manifest[Evaluation]:
    """Sample, measure and report.

    Raises `BadInput` for an extractor whose packages are missing or whose weights cannot be had, an empty prompts file, too few images for a metric,
    a patch larger than the teacher's pictures, weights that cannot be had, and a student whose timesteps its sampler does not have, all before
    anything is sampled.
    """
    network = open_extractor(config.extractor, workspace.outside, workspace.scratch, workspace.device)
    seed = workspace.seed if config.seed is None else config.seed
    prompts = _prompts(config, inputs, workspace, seed)
    pipeline = TeacherPipeline.load(workspace.fetch(inputs.teacher), workspace.device)
    real_images = (inputs.reference or inputs.selection).content.images
    check_scoring(config, len(prompts.images), real_images, pipeline.resolution)
    others = open_also(config, inputs.teacher, inputs.students, workspace)
    also = {other.config.name: other for other in others}
    rows = rows_of(config, inputs.teacher.content, inputs.students, [row for other in others for row in other.rows])
    for row in rows:
        scheduler_of(row, pipeline.scheduler_config)
    transfers = open_transfers(config, inputs, rows, workspace)

    count = len(rows) + 1 + sum(len(transfer.rows) + 1 for transfer in transfers)
    tick = _ticker(workspace, count * len(prompts.images))
    sampler = Sampler(pipeline, prompts, seed=seed, batch_size=config.batch_size, tick=tick)
    other_noise = Sampler(pipeline, prompts, seed=derive_seed(seed, "reference"), batch_size=config.batch_size, tick=tick)
    pieces, looks = Pieces(workspace), config.reference_config()
    singles = Singles.open(config, prompts, workspace, pipeline.resolution)
    with workspace.folder("evaluation") as folder:
        sets = RowSets(folder, looks, network, pieces, workspace)
        teacher = {"teacher": inputs.teacher.identity}
        of_teacher = sets.of_row(replace(rows[0], model="reference"), other_noise, pipeline.denoiser, teacher)
        given = inputs.reference
        real = sets.of_selection(inputs, pipeline.resolution) if given is None else read_reference(given, looks, workspace)
        scoring = Scoring(config, prompts.images, {"teacher": of_teacher, "real": real}, seed)
        scores: dict[str, Mapping[str, Score]] = {}
        timings: dict[str, Timing] = {}
        for row in rows:
            load = _loader(row, pipeline, also, inputs, workspace)
            made_of = also[row.model].made_of() if row.model in also else _student(row, inputs)
            own = sets.of_row(row, sampler, load, None if made_of is None else teacher | made_of)
            scores[row.name] = scoring.score(own, singles.of_row(row.slug, rows[0].slug, sets))
            if config.timing is not None:
                timings[row.name] = _timing(row, load, sampler, config, pieces)

        elsewhere: dict[str, Score] = {}
        for transfer in transfers:
            elsewhere |= _elsewhere(transfer, sets, scoring, (sampler, other_noise), inputs)
        measured = Measured(
            identity=workspace.identity,
            config=config,
            seed=seed,
            rows=rows,
            scores=scores,
            prompts=prompts,
            extractor=Features(network.title, of_teacher["whole"].statistics.dimensions, workspace.lineage.inputs.get(EXTRACTOR_WEIGHTS)),
            real_images=real_images,
            timings=timings,
            also=others,
            transfers=tuple(summarise_transfers(transfers, elsewhere)),
        )
        grids = _draw_grids(folder, measured, transfers)
        _write_report(folder, measured, inputs, grids, workspace)
        found = scores | {name: {"fid_teacher": score} for name, score in elsewhere.items()}
        write_tables(folder, [*rows, *(row for transfer in transfers for row in transfer.rows)], found)
        values = {name: {metric: score.value for metric, score in of_row.items()} for name, of_row in found.items()}
        intervals = {name: {metric: (score.low, score.high) for metric, score in of_row.items()} for name, of_row in found.items()}
        return workspace.publish(folder, Evaluation(scores=values, intervals=intervals, prompts=prompts.distinct, rows=sets.keys))


def _elsewhere(transfer: Transfer, sets: RowSets, scoring: Scoring, samplers: tuple[Sampler, Sampler], inputs: Inputs) -> dict[str, Score]:
    """FID to the changed teacher's own samples by row name; prompts and noise are those of the table's samplers, of its rows and its reference."""
    workspace = sets.workspace
    pipeline = transfer.load(workspace.device)
    encoded = transfer.pictures(pipeline, samplers[0], inputs, workspace)
    of_rows, of_reference = (sampler.on(pipeline, transfer.config.size_px, encoded) for sampler in samplers)
    weights = transfer.made_of(inputs, workspace)
    reference = sets.of_row(replace(transfer.rows[0], model="reference"), of_reference, pipeline.denoiser, weights, ("whole",))
    found = {}
    for row in transfer.rows:
        made_of = None if weights is None else {**weights, **_student(row, inputs)}
        own = sets.of_row(row, of_rows, _loader(row, pipeline, {}, inputs, workspace), made_of, ("whole",))
        found[row.name] = scoring.between(own["whole"], reference["whole"])
    return found


def _prompts(config: EvaluateConfig, inputs: Inputs, workspace: Workspace, seed: int) -> PromptSet:
    if "prompts" in workspace.outside:
        listed = read_prompts(local_copy(workspace.outside["prompts"], workspace.scratch))
        return assign(listed, config.prompt_count, config.images_per_prompt, "file")
    index = workspace.fetch(inputs.latents, ["index.parquet"]) / "index.parquet"
    captions = pq.read_table(index, columns=["caption"])["caption"].to_pylist()
    return assign(seeded_order(captions, seed), config.prompt_count, config.images_per_prompt, "captions")


def _loader(row: Row, pipeline: TeacherPipeline, also: Mapping[str, Also], inputs: Inputs, workspace: Workspace) -> Callable[[], Denoiser]:
    if row.model == TEACHER:
        return pipeline.denoiser
    if row.model in also:
        return functools.partial(also[row.model].load, pipeline)
    return functools.partial(_student_denoiser, row, pipeline, inputs, workspace)


def _student_denoiser(row: Row, pipeline: TeacherPipeline, inputs: Inputs, workspace: Workspace) -> Denoiser:
    manifest = inputs.students[row.model]
    return load_student(pipeline, manifest, workspace.fetch(manifest, weight_files(manifest)))


def _timing(row: Row, load: Callable[[], Denoiser], sampler: Sampler, config: EvaluateConfig, pieces: Pieces) -> Timing:
    with pieces.piece(f"timing-{row.slug}") as (folder, made):
        path = folder / "timing.json"
        if not made:
            path.write_text(json.dumps(time_row(row, load(), sampler, config).as_json()), encoding="utf-8")
        return Timing(**json.loads(path.read_text(encoding="utf-8")))


def _student(row: Row, inputs: Inputs) -> dict[str, str]:
    return {} if row.model == TEACHER else {"student": inputs.students[row.model].identity}


def _draw_grids(folder: Path, measured: Measured, transfers: Sequence[Transfer]) -> dict[str, GridPictures]:
    """Draw the table's pictures, `grid.png`, and those of every changed teacher, `grid-<entry>.png`; return them by entry, the table's as ``."""
    config, images = measured.config, measured.prompts.images
    shown = [index for number in range(config.grid_prompts) if (index := number * config.images_per_prompt) < len(images)]
    grids = {}
    for name, rows in {"": measured.rows, **{transfer.config.name: transfer.rows for transfer in transfers}}.items():
        groups = grid_groups(rows)
        pictures = [[first_pictures(samples_folder(folder, row.slug), shown) for row in group.rows] for group in groups]
        grids[name] = GridPictures(tuple(images[index] for index in shown), groups, pictures)
        draw_grid(grids[name].prompts, groups, pictures).save(folder / ("-".join(filter(None, ("grid", name))) + ".png"), optimize=True)
    return grids


def _write_report(folder: Path, measured: Measured, inputs: Inputs, grids: Mapping[str, GridPictures], workspace: Workspace) -> None:
    summary = summarise(
        measured,
        Sources(
            teacher=inputs.teacher,
            latents=inputs.latents,
            images=inputs.images,
            selection=inputs.selection,
            students=inputs.students,
            finetuned=inputs.finetuned,
            reference=inputs.reference,
            inputs=workspace.lineage.inputs,
            find=workspace.store.find,
        ),
    )
    (folder / "report.json").write_text(json.dumps(summary, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(render_report(summary, grids[""], grids, _curves(inputs, workspace)), encoding="utf-8")


def _curves(inputs: Inputs, workspace: Workspace) -> dict[str, TrainingCurves]:
    """Training curves by student, of those that have a metrics table."""
    name = "metrics.parquet"
    return {
        node: read_curves(workspace.fetch(manifest, [name]) / name)
        for node, manifest in inputs.students.items()
        if any(entry.path == name for entry in manifest.files)
    }


def _ticker(workspace: Workspace, total: int) -> Callable[[int], None]:
    done = 0

    def tick(images: int) -> None:
        nonlocal done
        done += images
        workspace.progress.update(done, total, "images")

    return tick
