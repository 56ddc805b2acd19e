"""The stage `evaluate`: samples of teacher and students on the same prompts and noise, their FIDs, a grid and a report."""

import functools
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from infra.outside import local_copy
from schemas.base import Sha256
from schemas.errors import BadInput
from schemas.evaluation import EvaluateConfig
from schemas.manifest import Evaluation, Manifest
from schemas.recipe import Recipe
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.pipeline import TeacherPipeline
from stages.evaluate.curves import Curve, read_curves
from stages.evaluate.features import extractor_spec, features_of
from stages.evaluate.fid import FeatureStatistics, frechet_distance
from stages.evaluate.grid import draw_grid, grid_groups
from stages.evaluate.inputs import Inputs
from stages.evaluate.past import PastRows, features_file, key_of, row_key, samples_folder
from stages.evaluate.pieces import Pieces
from stages.evaluate.prompts import PromptSet, assign, read_prompts, seeded_order
from stages.evaluate.report import GridPictures, render_report
from stages.evaluate.rows import TEACHER, Row, rows_of
from stages.evaluate.samples import Pixels, Sampler, first_pictures, read_pictures, real_pictures, sample_row, scheduler_of
from stages.evaluate.summary import Measured, Scores, Sources, summarise
from stages.evaluate.transfer import Transfer, open_transfers, preflight_transfers, summarise_transfers
from stages.selected import SelectedPictures
from stages.students import load_student, weight_files
from stages.training.randomness import derive_seed
from stages.workspace import Workspace

Measure = Callable[[Iterable[Pixels]], NDArray[np.float32]]
"""From pictures (H, W, 3) to features (N, D)."""

FeaturesOf = Callable[[Row, Sampler, Callable[[], Denoiser], Mapping[str, Any] | None], FeatureStatistics]
"""From a row, the sampler of its prompts and noise, what loads its denoiser, and what that is (None: not known), to the statistics of its samples."""

_DECIMALS: Final = 6
"""Digits of a score after the point: features are float32, so what follows is rounding."""


def preflight(config: EvaluateConfig, outside: Mapping[str, str], _recipe: Recipe) -> None:
    """Look for the extractor's packages and at a prompts file on this machine, hours before they are needed. Raises `BadInput`."""
    extractor_spec(config.extractor)
    preflight_transfers(config, outside)
    if "prompts" in outside and "://" not in outside["prompts"].removeprefix("file://"):
        read_prompts(Path(outside["prompts"].removeprefix("file://")))


def run(config: EvaluateConfig, inputs: Inputs, workspace: Workspace) -> Manifest[Evaluation]:
    """Sample, measure and report.

    Raises `BadInput` for an extractor whose packages are missing, an empty prompts file, too few real images and a student whose timesteps its
    sampler does not have, all before anything is sampled.
    """
    spec = extractor_spec(config.extractor)
    seed = workspace.seed if config.seed is None else config.seed
    prompts = _prompts(config, inputs, workspace, seed)
    if inputs.selection.content.images < 2:
        raise BadInput(f"evaluate: FID needs real images, and the selection has {inputs.selection.content.images}; expected at least 2")
    pipeline = TeacherPipeline.load(workspace.fetch(inputs.teacher), workspace.device)
    rows = rows_of(config, inputs.teacher.content, inputs.students)
    for row in rows:
        scheduler_of(row, pipeline.scheduler_config)
    transfers = open_transfers(config, inputs, rows, workspace)

    sets = len(rows) + 1 + sum(len(transfer.rows) + 1 for transfer in transfers)
    tick = _ticker(workspace, sets * len(prompts.images))
    sampler = Sampler(pipeline, prompts, seed=seed, batch_size=config.batch_size, tick=tick)
    reference = replace(rows[0], model="reference")
    other_noise = Sampler(pipeline, prompts, seed=derive_seed(seed, "reference"), batch_size=config.batch_size, tick=tick)
    pieces, past = Pieces(workspace), PastRows(workspace)
    kept: dict[str, Sha256] = {}
    extractor = functools.cache(spec.build)

    def measure(pictures: Iterable[Pixels]) -> NDArray[np.float32]:
        return features_of(pictures, extractor(workspace.device), workspace.device)

    with workspace.folder("evaluation") as folder:

        def features(row: Row, of: Sampler, load: Callable[[], Denoiser], weights: Mapping[str, Any] | None) -> FeatureStatistics:
            file, target = features_file(folder, row.slug), samples_folder(folder, row.slug)
            if weights is not None:
                kept[row.slug] = row_key(row, of, config.extractor, weights)
            if weights is not None and past.take(kept[row.slug], row.slug, folder):
                tick(len(prompts.images))
            else:
                sample_row(row, load, of, pieces, target)
                _keep_features(file, row.slug, functools.partial(read_pictures, target), measure, pieces)
            _free(workspace.device)
            return FeatureStatistics.of(load_file(file)["features"])

        own = {"teacher": inputs.teacher.identity}
        statistics = {
            row.name: features(row, sampler, functools.partial(_denoiser, row, pipeline, inputs, workspace), own | _student(row, inputs))
            for row in rows
        }
        of_teacher = features(reference, other_noise, pipeline.denoiser, own)
        real_file = features_file(folder, "real")
        kept["real"] = key_of(
            images=inputs.images.identity, selection=inputs.selection.identity, side=pipeline.resolution, extractor=config.extractor
        )
        if not past.take(kept["real"], "real", folder):
            chosen = SelectedPictures.open(inputs.images, inputs.selection, workspace)
            _keep_features(real_file, "real", lambda: real_pictures(chosen, pipeline.resolution), measure, pieces)
        real = FeatureStatistics.of(load_file(real_file)["features"])

        elsewhere: dict[str, float] = {}
        for transfer in transfers:
            elsewhere |= _elsewhere(transfer, features, (sampler, other_noise), inputs, workspace)
        measured = Measured(
            identity=workspace.identity,
            config=config,
            seed=seed,
            rows=rows,
            scores=_scores(statistics, of_teacher, real),
            prompts=prompts,
            extractor=spec,
            real_images=real.images,
            transfers=tuple(summarise_transfers(transfers, elsewhere)),
        )
        grids = _draw_grids(folder, measured, transfers)
        _write_report(folder, measured, inputs, grids, workspace)
        scores = {name: dict(values) for name, values in measured.scores.items()}
        scores |= {name: {"fid_teacher": value} for name, value in elsewhere.items()}
        return workspace.publish(folder, Evaluation(scores=scores, prompts=prompts.distinct, rows=kept))


def _elsewhere(
    transfer: Transfer, features: FeaturesOf, samplers: tuple[Sampler, Sampler], inputs: Inputs, workspace: Workspace
) -> dict[str, float]:
    """FID to the changed teacher's own samples by row name; prompts and noise are those of the table's samplers, of its rows and its reference."""
    pipeline = transfer.load(workspace.device)
    encoded = transfer.pictures(pipeline, samplers[0], inputs, workspace)
    of_rows, of_reference = (sampler.on(pipeline, transfer.config.size_px, encoded) for sampler in samplers)
    weights = transfer.made_of(inputs, workspace)
    own = features(replace(transfer.rows[0], model="reference"), of_reference, pipeline.denoiser, weights)
    found = {
        row.name: features(
            row,
            of_rows,
            functools.partial(_denoiser, row, pipeline, inputs, workspace),
            None if weights is None else {**weights, **_student(row, inputs)},
        )
        for row in transfer.rows
    }
    return {name: round(frechet_distance(statistics, own), _DECIMALS) for name, statistics in found.items()}


def _prompts(config: EvaluateConfig, inputs: Inputs, workspace: Workspace, seed: int) -> PromptSet:
    if "prompts" in workspace.outside:
        listed = read_prompts(local_copy(workspace.outside["prompts"], workspace.scratch))
        return assign(listed, config.prompt_count, config.images_per_prompt, "file")
    index = workspace.fetch(inputs.latents, ["index.parquet"]) / "index.parquet"
    captions = pq.read_table(index, columns=["caption"])["caption"].to_pylist()
    return assign(seeded_order(captions, seed), config.prompt_count, config.images_per_prompt, "captions")


def _denoiser(row: Row, pipeline: TeacherPipeline, inputs: Inputs, workspace: Workspace) -> Denoiser:
    if row.model == TEACHER:
        return pipeline.denoiser()
    manifest = inputs.students[row.model]
    return load_student(pipeline, manifest, workspace.fetch(manifest, weight_files(manifest)))


def _student(row: Row, inputs: Inputs) -> dict[str, str]:
    return {} if row.model == TEACHER else {"student": inputs.students[row.model].identity}


def _keep_features(file: Path, name: str, pictures: Callable[[], Iterable[Pixels]], measure: Measure, pieces: Pieces) -> None:
    """Write the pictures' features to `file`, and keep them: a killed run does not look at the pictures again."""
    with pieces.piece(f"features-{name}") as (folder, made):
        path = folder / "features.safetensors"
        if not made:
            save_file({"features": measure(pictures())}, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, file)


def _scores(statistics: Mapping[str, FeatureStatistics], of_teacher: FeatureStatistics, real: FeatureStatistics) -> Scores:
    """FIDs of every row.

    The teacher's own samples come from other noise than the rows': with shared noise a row would be compared picture by picture, and a
    distance below that of two sets of the teacher's own would say nothing about the distribution.
    """
    references = {"fid_teacher": of_teacher, "fid_real": real}
    return {
        row: {metric: round(frechet_distance(own, reference), _DECIMALS) for metric, reference in references.items()}
        for row, own in statistics.items()
    }


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
    rows = measured.rows
    summary = summarise(
        measured, Sources(inputs.teacher, inputs.latents, inputs.images, inputs.selection, inputs.students, inputs.finetuned)
    )
    (folder / "report.json").write_text(json.dumps(summary, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(render_report(summary, grids[""], grids, _curves(inputs, workspace)), encoding="utf-8")
    table = [
        {"row": row.name, "model": row.model, "family": row.family, "steps": row.steps} | dict(measured.scores[row.name]) for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(table), folder / "scores.parquet")


def _curves(inputs: Inputs, workspace: Workspace) -> dict[str, tuple[Curve, ...]]:
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


def _free(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
