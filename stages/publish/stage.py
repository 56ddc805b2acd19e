"""The stage `publish`: teacher and students in the layout that plain diffusers calls load, with a model card."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from schemas.base import Model
from schemas.evaluation import PublishConfig
from schemas.manifest import Evaluation, FinetunedLoRA, Manifest, PublishedModel, StudentManifest, Teacher
from schemas.recipe import Recipe
from stages.diffusion.facts import read_config
from stages.diffusion.kohya import save_kohya
from stages.diffusion.lora import LORA_FILE
from stages.evaluate.schedulers import checked_scheduler
from stages.publish.card import render_card
from stages.publish.export import check_destination, export_folder
from stages.publish.variants import DESCRIPTION, TEACHER, Description, TeacherSampling, style_of, variant_names, variant_of
from stages.students import weight_files
from stages.workspace import Workspace

_PICTURES = ("grid.png", "report.html")
"""Files of the evaluation that the card shows or links to."""

_LEFT_BEHIND = ("README.md", ".gitattributes", "metrics.parquet")
"""Files of a teacher that are not part of a model."""


class Inputs(Model):
    """What is handed out."""

    teacher: Manifest[Teacher]
    students: dict[str, StudentManifest] = {}
    styles: dict[str, Manifest[FinetunedLoRA]] = {}
    evaluation: Manifest[Evaluation]


def preflight(config: PublishConfig, _outside: Mapping[str, str], _recipe: Recipe) -> None:
    """Look at the destination hours before it is written to. Raises `BadInput` where something else lies there."""
    if config.destination is not None:
        check_destination(config.destination)


def run(config: PublishConfig, inputs: Inputs, workspace: Workspace) -> Manifest[PublishedModel]:
    """Lay out the model, write its card, and export it where `config.destination` says.

    Raises `BadInput` for a destination where something else lies, before any copying, and for a student whose timesteps its sampler does not have.
    """
    if config.destination is not None:
        check_destination(config.destination)
    teacher = workspace.fetch(inputs.teacher)
    scheduler_config = read_config(teacher, "scheduler", "scheduler_config.json")
    unet_config = read_config(teacher, "unet")
    evaluation = workspace.fetch(inputs.evaluation, ["report.json", *_PICTURES])
    summary = json.loads((evaluation / "report.json").read_text(encoding="utf-8"))
    with workspace.folder("published") as folder:
        reference = summary["rows"][0]
        of_teacher = checked_scheduler(
            TEACHER, reference["sampler"], scheduler_config, reference["prediction_type"], [reference["timesteps"]]
        )
        if config.include_pipeline:
            _copy([entry.path for entry in inputs.teacher.files if entry.path not in _LEFT_BEHIND], teacher, folder)
            of_teacher.save_pretrained(folder / TEACHER / "scheduler")
        variants = {}
        names = variant_names(inputs.students)
        for node, manifest in inputs.students.items():
            content = manifest.content
            grids = [content.timesteps[steps] for steps in content.steps]
            scheduler = checked_scheduler(node, content.sampler, scheduler_config, content.prediction_type, grids)
            files = weight_files(manifest)
            _copy(files, workspace.fetch(manifest, files), folder / names[node])
            scheduler.save_pretrained(folder / names[node] / "scheduler")
            kohya = _add_kohya(folder / names[node], unet_config, config.name) if LORA_FILE in files else None
            variants[names[node]] = variant_of(manifest, scheduler, kohya)
        styles = {}
        for node, style in inputs.styles.items():
            _copy([LORA_FILE], workspace.fetch(style, [LORA_FILE]), folder / node)
            styles[node] = style_of(style, _add_kohya(folder / node, unet_config, config.name))
        description = Description(
            name=config.name,
            pipeline=inputs.teacher.content.architecture,
            resolution=inputs.teacher.content.resolution,
            complete=config.include_pipeline,
            base_model=config.base_model,
            teacher=TeacherSampling(
                scheduler=type(of_teacher).__name__, steps=reference["steps"], guidance_scale=reference["guidance_scale"]
            ),
            variants=variants,
            styles=styles,
        )
        (folder / DESCRIPTION).write_text(description.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(render_card(config, description, summary, inputs.students), encoding="utf-8")
        for name in _PICTURES:
            shutil.copyfile(evaluation / name, folder / name)
        published = PublishedModel(variants={name: variant.model_dump(mode="json") for name, variant in variants.items()})
        made = workspace.publish(folder, published)
        if config.destination is not None:
            export_folder(folder, config.destination)
        return made


def _add_kohya(folder: Path, unet_config: Mapping[str, Any], model: str) -> str:
    """Write a LoRA's second file beside its first and return its name, which says what it is where all lie in one folder."""
    path = folder / f"{model}-{folder.name}-kohya.safetensors"
    save_kohya(folder, unet_config, path)
    return path.name


def _copy(paths: Iterable[str], source: Path, destination: Path) -> None:
    """Copy files of an artifact."""
    for path in paths:
        target = destination / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, target)
