"""Rows of published checkpoints: what each is, how it is sampled and who told that, and its weights on the teacher."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from infra.outside import local_copy
from schemas.also import AlsoConfig, PredictionName, SamplerName, Told
from schemas.errors import BadInput
from schemas.evaluation import EvaluateConfig
from schemas.lightning import TRAIN_TIMESTEPS, trailing_timesteps
from schemas.manifest import Manifest, StudentManifest, Teacher
from schemas.recipe import Recipe
from stages.diffusion.checkpoint_files import Checkpoint, check_checkpoint, find_checkpoint, load_checkpoint, wanted
from stages.diffusion.denoiser import Denoiser, UNetDenoiser
from stages.diffusion.facts import MODEL_INDEX, read_config
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.prediction import PREDICTION_TYPES
from stages.diffusion.schedule import NoiseSchedule, lcm_timesteps
from stages.evaluate.rows import Row
from stages.workspace import Workspace

logger = logging.getLogger(__name__)

_TOLD_SCALE: Final = 8.0
"""Scale for a UNet that is told one (LCM, arXiv 2310.04378, table 1)."""


@dataclass(frozen=True)
class Also:
    """One entry of `evaluate.also`, its files at hand and found to fit."""

    config: AlsoConfig
    checkpoint: Checkpoint
    rows: tuple[Row, ...]
    note: str
    """What it is, how it is sampled, and who told that."""
    weights: str | None
    """Digest of its content; None where it is not known."""

    def load(self, pipeline: TeacherPipeline) -> Denoiser:
        """Its network on the teacher's schedule. Raises `BadInput` for a LoRA that diffusers' loader refuses."""
        unet = load_checkpoint(self.checkpoint, pipeline, _field(self.config))
        return UNetDenoiser(unet, pipeline.schedule, PREDICTION_TYPES[self.rows[0].prediction_type])

    def made_of(self) -> dict[str, str] | None:
        """By digest what draws its rows beside the teacher's text encoders and VAE."""
        return None if self.weights is None else {"also": self.weights}


def open_also(
    config: EvaluateConfig, teacher: Manifest[Teacher], students: Mapping[str, StudentManifest], workspace: Workspace
) -> tuple[Also, ...]:
    """Find every entry's files, hold them against the teacher by headers alone, and decide how they are sampled.

    Raises `BadInput` for a name that a student has, a file that is no checkpoint or does not fit, another noise schedule, and where nothing tells
    step counts or sampler.
    """
    base = workspace.fetch(teacher) if config.also else Path()
    found = []
    for entry in config.also:
        if entry.name in students:
            raise BadInput(f"{_field(entry)}: a student has this name; expected another")
        place = local_copy(workspace.outside.get(entry.outside_name, entry.path), workspace.scratch, wanted)
        checkpoint = find_checkpoint(place, _field(entry))
        check_checkpoint(checkpoint, base, _field(entry))
        _check_schedule(checkpoint, base, _field(entry))
        rows, note = sampled(entry, checkpoint, teacher.content.prediction_type)
        logger.info("%s", note)
        found.append(Also(entry, checkpoint, rows, note, workspace.lineage.inputs.get(entry.outside_name)))
    return tuple(found)


def preflight_also(config: EvaluateConfig, outside: Mapping[str, str], recipe: Recipe) -> None:
    """The same for entries that lie on this machine, against the recipe's teacher where that does too. Raises `BadInput`."""
    teacher = None if recipe.teacher is None else Path(recipe.teacher.address.removeprefix("file://"))
    base = teacher if teacher is not None and (teacher / MODEL_INDEX).is_file() and recipe.teacher and not recipe.teacher.variant else None
    for entry in config.also:
        path = Path(outside[entry.outside_name].removeprefix("file://"))
        if not path.exists():
            continue  # elsewhere: brought here when the stage begins
        checkpoint = find_checkpoint(path, _field(entry))
        sampled(entry, checkpoint, "epsilon")
        if base is not None:
            check_checkpoint(checkpoint, base, _field(entry))
            _check_schedule(checkpoint, base, _field(entry))


def sampled(config: AlsoConfig, checkpoint: Checkpoint, teacher: PredictionName) -> tuple[tuple[Row, ...], str]:
    """Its rows, most steps first, and a sentence that says who told what of them: the recipe, else the configuration of a scheduler beside the
    weights, else the name, else what networks of its kind have in common. `teacher` is the teacher's prediction type.

    Raises `BadInput` where nothing tells step counts or sampler, and for steps that the sampler's grid does not have.
    """
    name, beside = config.told, _told_by_scheduler(checkpoint)
    recipe = Told(steps=config.steps, sampler=config.sampler, prediction_type=config.prediction_type)
    kind = Told(sampler="lcm" if checkpoint.takes_guidance else None)
    told = {"the recipe": recipe, "the scheduler beside it": beside, "its name": name, "its guidance input": kind}
    who: dict[str, str] = {}
    for source, by in told.items():
        for field in by.model_dump(exclude_none=True):
            who.setdefault(field, source)
    for field, such in (("steps", "[4]"), ("sampler", "trailing, or lcm, or lcm-trailing")):
        if field not in who:
            raise BadInput(f"{_field(config)}: neither its name nor a configuration tells its {field}; expected {field}: {such}")
    steps: tuple[int, ...] = tuple(sorted(set(told[who["steps"]].steps or ()), reverse=True))
    sampler = told[who["sampler"]].sampler
    assert sampler is not None, "somebody told it"
    prediction = told[who["prediction_type"]].prediction_type if "prediction_type" in who else teacher
    start = told[who["start"]].start if "start" in who else None
    guidance_scale = config.guidance_scale or (_TOLD_SCALE if checkpoint.takes_guidance else 1.0)
    rows = tuple(
        Row(
            model=config.name,
            family=config.name,
            steps=count,
            timesteps=_grid(config, sampler, count, start),
            sampler=sampler,
            prediction_type=prediction or teacher,
            guidance_scale=guidance_scale,
            guidance_input=checkpoint.takes_guidance,
        )
        for count in steps
    )
    said = [
        f"steps {', '.join(map(str, steps))} ({who['steps']})",
        f"sampler {sampler} ({who['sampler']})",
        f"prediction_type {prediction} ({who.get('prediction_type', 'as the teacher')})",
        f"guidance {guidance_scale:g} ({'the recipe' if config.guidance_scale else 'the default'})",
    ]
    said += [f"at timestep {start} ({who['start']})"] if start is not None and steps == (1,) else []
    own = checkpoint.scheduler_config.get("_class_name", "")
    said += [f"its own scheduler, {own}, adds noise that Euler does not"] if "Ancestral" in own else []
    what = "LoRA" if checkpoint.kind == "lora" else "UNet"
    return (
        rows,
        f"{config.name}: a {what} from outside, on the teacher's text encoders and VAE; who told how it is sampled: {'; '.join(said)}.",
    )


def _told_by_scheduler(checkpoint: Checkpoint) -> Told:
    config = checkpoint.scheduler_config
    if not config:
        return Told()
    sampler: SamplerName | None = None
    if config.get("_class_name") == "LCMScheduler":
        sampler = "lcm" if config.get("original_inference_steps", 50) == 50 else "lcm-trailing"
    elif config.get("timestep_spacing") == "trailing":
        sampler = "trailing"
    timesteps = config.get("num_train_timesteps", TRAIN_TIMESTEPS)
    return Told(
        sampler=sampler,
        prediction_type=config.get("prediction_type", "epsilon"),
        start=timesteps - 1 if timesteps < TRAIN_TIMESTEPS else None,
    )


def _grid(config: AlsoConfig, sampler: SamplerName, steps: int, start: int | None) -> tuple[int, ...]:
    if steps == 1 and start is not None:
        return (start,)
    try:
        return lcm_timesteps(steps) if sampler == "lcm" else trailing_timesteps(steps)
    except ValueError as error:
        raise BadInput(f"{_field(config)}.steps: {error}") from error


def _check_schedule(checkpoint: Checkpoint, base: Path, field: str) -> None:
    """A scheduler beside the weights has the teacher's noise schedule, or the beginning of it."""
    if not checkpoint.scheduler_config:
        return
    own = NoiseSchedule.from_scheduler_config(checkpoint.scheduler_config).alphas_cumprod
    teachers = NoiseSchedule.from_scheduler_config(read_config(base, "scheduler", "scheduler_config.json")).alphas_cumprod
    if len(own) > len(teachers) or not torch.allclose(own, teachers[: len(own)]):
        raise BadInput(f"{field}: the scheduler beside it has another noise schedule than the teacher; expected the teacher's")


def _field(config: AlsoConfig) -> str:
    return f"evaluate.{config.outside_name}"
