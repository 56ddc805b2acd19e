"""The whole plan in one file: one section a stage, and the checks that no section can make alone."""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from operator import attrgetter, gt, lt
from typing import Annotated

from schemas.base import Field, Mistake, Model, NotIdentity, Place
from schemas.data import EncodeConfig, IngestConfig, MeasureConfig, SelectConfig
from schemas.dmd import DmdConfig
from schemas.evaluation import EvaluateConfig, PublishConfig
from schemas.finetune import FinetuneConfig, FinetuneName, finetune_named
from schemas.gates import Gate, GateName
from schemas.lcm import LcmConfig
from schemas.lightning import LightningConfig
from schemas.pairs import PairsConfig
from schemas.schedule import Schedule
from schemas.teacher import TeacherConfig, TrainTeacherConfig
from schemas.training import TrainingConfig

PoolName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
"""Lower case, digits, dashes."""


class Recipe(Model):
    """One distillation job, from a table of URLs to a published student."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$"), NotIdentity]
    """Lower case, digits, dashes."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random that does not name its own."""
    ingest: IngestConfig
    measure: MeasureConfig = MeasureConfig()
    select: SelectConfig = SelectConfig()
    encode: EncodeConfig = EncodeConfig()
    teacher: TeacherConfig | None = None
    """A teacher to load. Exactly one of `teacher` and `train_teacher`."""
    train_teacher: TrainTeacherConfig | None = None
    """A small teacher to train from scratch on the selection."""
    pairs: PairsConfig | None = None
    """Noise-output pairs of the teacher's deterministic sampler."""
    finetune: dict[FinetuneName, FinetuneConfig] = {}
    """Style LoRAs and other bases made of the teacher, by name."""
    lightning: LightningConfig | None = None
    lcm: LcmConfig | None = None
    dmd: DmdConfig | None = None
    evaluate: EvaluateConfig | None = None
    publish: PublishConfig | None = None
    pools: Annotated[dict[str, PoolName], NotIdentity] = {}
    """Work pool of Prefect whose workers run a section's stage, by the section's name, such as {lightning: gpu}. Stages of sections that are not
    named run where the chain runs; without any pool the whole chain runs in one process."""
    gates: Annotated[dict[GateName, Gate], NotIdentity] = {}
    """Bounds that artifacts must keep for the chain to go on, by name, such as {fid: {after: evaluate, metric: fid_teacher, student: lcm, steps: 4,
    at_most: 60}}."""
    schedule: Annotated[Schedule | None, NotIdentity] = None
    """When the chain is run by itself, once `distill deploy --schedule` has told the server."""


def _one_teacher(recipe: Recipe) -> Iterator[Mistake]:
    if (recipe.teacher is None) == (recipe.train_teacher is None):
        found = "both" if recipe.teacher else "neither"
        yield ("teacher",), found, "expected exactly one of the sections teacher and train_teacher"


def _aesthetic_has_a_source(recipe: Recipe) -> Iterator[Mistake]:
    threshold = recipe.select.min_aesthetic
    if threshold is not None and not recipe.ingest.columns.aesthetic and recipe.measure.aesthetic_predictor is None:
        expected = "a threshold needs a score: expected names in ingest.columns.aesthetic, or measure.aesthetic_predictor, or null here"
        yield ("select", "min_aesthetic"), threshold, expected


def _ingest_drops_no_more_by_size(recipe: Recipe) -> Iterator[Mistake]:
    if recipe.ingest.min_side_px > recipe.select.min_side_px:
        expected = f"would drop rows that select keeps: expected at most select.min_side_px = {recipe.select.min_side_px}"
        yield ("ingest", "min_side_px"), recipe.ingest.min_side_px, expected


def _ingest_drops_no_more_by_score(recipe: Recipe) -> Iterator[Mistake]:
    for name in ("min_aesthetic", "min_similarity", "max_watermark", "max_unsafe"):
        early, late = getattr(recipe.ingest, name), getattr(recipe.select, name)
        side, stricter = ("most", gt) if name.startswith("min") else ("least", lt)
        if early is not None and (late is None or stricter(early, late)):
            bound = "null" if late is None else f"at {side} select.{name} = {late}, or null"
            yield ("ingest", name), early, f"would drop rows that select keeps: expected {bound}"


def _ingest_drops_no_more_labels(recipe: Recipe) -> Iterator[Mistake]:
    kept = {label.upper() for label in recipe.ingest.drop_nsfw} - set(recipe.select.drop_nsfw)
    if kept:
        expected = f"would drop rows that select keeps: expected none but those of select.drop_nsfw = {list(recipe.select.drop_nsfw)}"
        yield ("ingest", "drop_nsfw"), list(recipe.ingest.drop_nsfw), expected


def _similarity_has_a_source(recipe: Recipe) -> Iterator[Mistake]:
    threshold = recipe.select.min_similarity
    if threshold is not None and not recipe.ingest.columns.similarity:
        expected = "every picture would pass, for the table has no such column: expected names in ingest.columns.similarity, or null here"
        yield ("select", "min_similarity"), threshold, expected


def _batch_divides(path: str, recipe: Recipe) -> Iterator[Mistake]:
    for place, config in _trainings(path, recipe).items():
        section = ".".join(map(str, place))
        if config.batch_size % config.accumulation_steps:
            expected = f"expected a divisor of {section}.batch_size = {config.batch_size}"
            yield (*place, "accumulation_steps"), config.accumulation_steps, expected
        elif config.world_size is not None and config.batch_size % _parts(config):
            divided = f"{section}.accumulation_steps = {config.accumulation_steps}"
            expected = f"times {divided}: expected a divisor of {section}.batch_size = {config.batch_size}"
            yield (*place, "world_size"), config.world_size, expected


def _parts(config: TrainingConfig) -> int:
    """Micro-batches that a batch is cut in, as far as the recipe says."""
    return config.accumulation_steps * (config.world_size or 1)


def _only_students_are_sharded(path: str, recipe: Recipe) -> Iterator[Mistake]:
    for place, config in _trainings(path, recipe).items():
        if config.sharding == "full":
            yield (*place, "sharding"), "full", "a teacher trained here is small: expected none or optimizer"


def _warmup_ends(path: str, recipe: Recipe) -> Iterator[Mistake]:
    for place, config in _trainings(path, recipe).items():
        if config.warmup_steps >= config.training_steps:
            section = ".".join(map(str, place))
            expected = f"the run would end inside its warm-up: expected fewer than {section}.training_steps = {config.training_steps}"
            yield (*place, "warmup_steps"), config.warmup_steps, expected


def _trainings(path: str, recipe: Recipe) -> Mapping[Place, TrainingConfig]:
    """The section at a path, or each of its entries where it has them by name; none where the recipe has no such section."""
    if getattr(recipe, path.partition(".")[0]) is None:
        return {}
    section: TrainingConfig | Mapping[str, TrainingConfig] = attrgetter(path)(recipe)
    if isinstance(section, Mapping):
        return {(path, name): config for name, config in section.items()}
    return {tuple(path.split(".")): section}


def _links_add_up(recipe: Recipe) -> Iterator[Mistake]:
    config = recipe.lightning
    for steps, override in (config.links if config else {}).items():
        assert config is not None
        if override.batch_size is not None and override.batch_size % _parts(config):
            expected = f"expected a multiple of lightning.accumulation_steps = {config.accumulation_steps}"
            expected += f" times lightning.world_size = {config.world_size}" if config.world_size else ""
            yield ("lightning", "links", steps, "batch_size"), override.batch_size, expected
        if override.training_steps is not None and override.training_steps <= config.warmup_steps:
            expected = f"the link would end inside its warm-up: expected more than lightning.warmup_steps = {config.warmup_steps}"
            yield ("lightning", "links", steps, "training_steps"), override.training_steps, expected


def _pairs_are_drawn(recipe: Recipe) -> Iterator[Mistake]:
    for name in ("lightning", "lcm"):
        section: LightningConfig | LcmConfig | None = getattr(recipe, name)
        if section is not None and section.latents == "pairs" and recipe.pairs is None:
            yield (name, "latents"), "pairs", "no stage draws them: expected a section pairs, such as pairs: {count: 10000}"


def _published_is_measured(recipe: Recipe) -> Iterator[Mistake]:
    if recipe.publish is not None and recipe.evaluate is None:
        yield ("publish",), recipe.publish.name, "the model card needs figures: expected a section evaluate"


def _published_is_made(recipe: Recipe) -> Iterator[Mistake]:
    made = (recipe.lightning, recipe.lcm, recipe.dmd, recipe.train_teacher)
    styles = any(config.network == "lora" for config in recipe.finetune.values())
    if recipe.publish is not None and not styles and all(section is None for section in made):
        yield ("publish",), recipe.publish.name, "no stage makes a student: expected a section lightning, lcm or dmd"


def _dmd_has_its_pairs(recipe: Recipe) -> Iterator[Mistake]:
    dmd, pairs = recipe.dmd, recipe.pairs
    if dmd is None or not dmd.reads_pairs:
        return
    if pairs is None:
        yield ("dmd", "regression"), None, "regression and warm_up read the teacher's pairs: expected a section pairs, or null in both"
    elif pairs.guidance_scale != dmd.guidance_scale:
        expected = f"pairs and real score are guided alike (DMD 3.4): expected pairs.guidance_scale = {pairs.guidance_scale}"
        yield ("dmd", "guidance_scale"), dmd.guidance_scale, expected


_LINK = re.compile(r"lightning-\d+-\d+")
"""How the names of runs of `lightning` begin."""

_TRANSFERRED = {"base": "unet", "style": "lora"}
"""What `finetune` must train for each field of `evaluate.transfer`."""


def _transfers_are_made(recipe: Recipe) -> Iterator[Mistake]:
    for number, entry in enumerate(recipe.evaluate.transfer if recipe.evaluate is not None else ()):
        for field, run in entry.finetuned().items():
            config = recipe.finetune.get(finetune_named(run) or "")
            if config is None or config.network != _TRANSFERRED[field]:
                fitting = [f"finetune-{name}" for name, other in recipe.finetune.items() if other.network == _TRANSFERRED[field]]
                expected = (
                    f"names no run of finetune with network: {_TRANSFERRED[field]}: expected one ({', '.join(fitting) or 'there is none'})"
                )
                yield ("evaluate", "transfer", number, field), run, f"{expected}, or a path, such as ./{run}"


_NO_STAGE = ("name", "seed", "pools", "gates", "schedule")
"""Fields that are no stage's section."""


def _also_is_no_run(recipe: Recipe) -> Iterator[Mistake]:
    for number, entry in enumerate(recipe.evaluate.also if recipe.evaluate is not None else ()):
        section = "lightning" if _LINK.match(entry.name) else entry.name if entry.name in ("lcm", "dmd") else None
        if section is not None and getattr(recipe, section) is not None:
            yield ("evaluate", "also", number, "name"), entry.name, f"runs of {section} have such names: expected another"


def _pools_are_of_sections(recipe: Recipe) -> Iterator[Mistake]:
    sections = [name for name in Recipe.model_fields if name not in _NO_STAGE]
    for name, pool in recipe.pools.items():
        if name not in sections:
            yield ("pools", name), pool, f"is no stage's section: expected one of {', '.join(sections)}"


_TRAINING = ("train_teacher.autoencoder.training", "train_teacher.training", "finetune", "lightning", "lcm", "dmd")

Recipe.cross_checks = (
    _one_teacher,
    _aesthetic_has_a_source,
    _ingest_drops_no_more_by_size,
    _ingest_drops_no_more_by_score,
    _ingest_drops_no_more_labels,
    _similarity_has_a_source,
    *(partial(_batch_divides, path) for path in _TRAINING),
    *(partial(_warmup_ends, path) for path in _TRAINING),
    *(partial(_only_students_are_sharded, path) for path in _TRAINING if path.startswith("train_teacher")),
    _links_add_up,
    _dmd_has_its_pairs,
    _pairs_are_drawn,
    _published_is_measured,
    _published_is_made,
    _transfers_are_made,
    _also_is_no_run,
    _pools_are_of_sections,
)
