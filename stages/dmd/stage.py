"""Stage `dmd`: a student whose outputs are distributed as the teacher's (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867)."""

from collections.abc import Mapping
from typing import Any

from infra.outside import on_this_machine
from schemas.base import Model
from schemas.dmd import DmdConfig
from schemas.errors import BadInput
from schemas.manifest import Latents, Manifest, Pairs, StudentLoRA, StudentUNet, Teacher
from schemas.recipe import Recipe
from stages.dmd.batches import batch_reader
from stages.dmd.decoding import OUTSIDE_DECODER, OUTSIDE_VGG, open_distance
from stages.dmd.matching import DistributionMatching
from stages.dmd.networks import Networks
from stages.dmd.warm_up import PairRegression
from stages.latents import LatentSet
from stages.pairs.pair_set import PairSet
from stages.perceptual import check_packages
from stages.start import preflight_start
from stages.students import check_teacher
from stages.training import Row, train
from stages.watching import StudentWatch, check_watch, publish_student
from stages.workspace import Workspace


class Inputs(Model):
    """What the stage reads."""

    teacher: Manifest[Teacher]
    latents: Manifest[Latents]
    pairs: Manifest[Pairs] | None = None
    """For regression and the warm-up."""


def preflight(config: DmdConfig, outside: Mapping[str, str], _recipe: Recipe) -> None:
    """Look for the packages that weights come from, and at what lies on this machine: weights, and a student to go on from. Raises `BadInput`."""
    check_watch("dmd", config, outside)
    preflight_start(config, outside)
    if config.regression is not None:
        check_packages(config.regression)
    here = {name: on_this_machine(outside[name]) for name in (OUTSIDE_VGG, OUTSIDE_DECODER) if name in outside}
    if (path := here.get(OUTSIDE_VGG)) is not None and path.is_dir():
        raise BadInput(f"dmd.regression.vgg {path}: is a folder; expected a file with torchvision's VGG-16 weights")
    if (path := here.get(OUTSIDE_DECODER)) is not None and not (path / "config.json").exists():
        raise BadInput(f"dmd.regression.decoder {path}: has no config.json; expected the folder of an AutoencoderTiny")


def run(config: DmdConfig, inputs: Inputs, workspace: Workspace) -> Manifest[Any]:
    """Train the student and publish its UNet or LoRA.

    Raises `BadInput` for latents or pairs of another teacher, and for weights of the distance that cannot be had, before training.
    """
    check_teacher(inputs.teacher, inputs.latents)
    seed = workspace.seed if config.seed is None else config.seed
    latents = LatentSet.open(inputs.latents, workspace, inputs.teacher)
    pairs = _pairs(config, inputs, workspace)
    matched_pairs = pairs if config.regression is not None else None
    distance = open_distance(config, inputs.teacher, workspace)
    networks = Networks.build(config, inputs.teacher, latents.latent_shape, workspace, seed=seed)
    warmed_up = _warm_up(config, networks, pairs, workspace, seed=seed)
    method = DistributionMatching(
        config,
        teacher=networks.teacher,
        student=networks.student,
        fake=networks.fake,
        unconditional=latents.unconditional(1),
        distance=distance,
        judge=networks.judge,
        as_teacher=networks.as_teacher,
    )
    content = _content(config, inputs.teacher, networks)
    watch = StudentWatch.open(config, networks.student, content, teacher=inputs.teacher, latents=latents, workspace=workspace)
    pictures = latents if config.gan is not None or matched_pairs is None else None
    read = batch_reader(pictures, matched_pairs)
    samples = len(latents) if matched_pairs is None else len(matched_pairs)
    rows = train(method, read, samples, config, workspace, seed=seed, observer=watch)
    return publish_student(networks.student, content, rows, config, workspace, watch=watch, converted=warmed_up)


def _pairs(config: DmdConfig, inputs: Inputs, workspace: Workspace) -> PairSet | None:
    """The pairs that the recipe needs. Raises `BadInput` where there are none, or another teacher's."""
    if not config.reads_pairs:
        return None
    if inputs.pairs is None:
        raise BadInput("dmd: regression and warm_up read pairs; expected an artifact of the stage pairs")
    if inputs.pairs.content.teacher != inputs.teacher.identity:
        made = f"pairs {inputs.pairs.identity[:12]}: drawn by the teacher {inputs.pairs.content.teacher[:12]}"
        raise BadInput(f"{made}; expected those of {inputs.teacher.identity[:12]}")
    return PairSet.open(inputs.pairs, workspace)


def _warm_up(config: DmdConfig, networks: Networks, pairs: PairSet | None, workspace: Workspace, *, seed: int) -> list[Row]:
    if config.warm_up is None or pairs is None:
        return []
    optimizer = config.optimizer.model_copy(update={"learning_rate": config.warm_up.learning_rate})
    own = {"training_steps": config.warm_up.training_steps, "optimizer": optimizer, "ema_decay": None}
    changed = config.model_copy(update=own)
    return train(
        PairRegression(changed, networks.student), batch_reader(None, pairs), len(pairs), changed, workspace, seed=seed, name="warm-up"
    )


def _content(config: DmdConfig, teacher: Manifest[Teacher], networks: Networks) -> StudentUNet | StudentLoRA:
    facts: dict[str, Any] = {
        "method": "dmd" if config.gan is None else "dmd2",
        "steps": (config.steps,),
        "timesteps": {config.steps: config.timesteps},
        "sampler": "lcm-trailing",  # whose first input is the noise itself; Euler's is sigma / sqrt(sigma^2 + 1) of it
        "prediction_type": networks.student.denoiser.prediction.name,
        "guidance_scale": 1.0,
        "teacher": teacher.identity,
        "training_steps": config.training_steps,
    }
    if config.network == "lora":
        return StudentLoRA(**facts, rank=config.lora_rank, alpha=config.lora_alpha)
    return StudentUNet(**facts)
