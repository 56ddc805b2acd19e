"""The whole plan in one file: one section a stage, and the checks that no section can make alone."""

from collections.abc import Callable
from typing import Annotated, ClassVar

from pydantic import model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError

from schemas.base import Field, Model, NotIdentity
from schemas.data import EncodeConfig, IngestConfig, SelectConfig
from schemas.evaluation import EvaluateConfig, PublishConfig
from schemas.lcm import LcmConfig
from schemas.lightning import LightningConfig
from schemas.teacher import TeacherConfig, TrainTeacherConfig

Mistake = tuple[tuple[str, ...], object, str]
"""YAML path, the value found, and a sentence that says what was expected."""


class Recipe(Model):
    """One distillation job, from a table of URLs to a published student."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$"), NotIdentity]
    """Lower case, digits, dashes."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random that does not name its own."""
    ingest: IngestConfig
    select: SelectConfig = SelectConfig()
    encode: EncodeConfig = EncodeConfig()
    teacher: TeacherConfig | None = None
    """A teacher to load. Exactly one of `teacher` and `train_teacher`."""
    train_teacher: TrainTeacherConfig | None = None
    """A small teacher to train from scratch on the selection."""
    lightning: LightningConfig | None = None
    lcm: LcmConfig | None = None
    evaluate: EvaluateConfig | None = None
    publish: PublishConfig | None = None

    cross_checks: ClassVar[list[Callable[["Recipe"], list[Mistake]]]] = []

    @model_validator(mode="after")
    def _sections_agree(self) -> "Recipe":
        mistakes = [mistake for check in self.cross_checks for mistake in check(self)]
        if mistakes:
            raise ValidationError.from_exception_data(
                "Recipe",
                [
                    InitErrorDetails(type=PydanticCustomError("cross_section", "{expected}", {"expected": expected}), loc=path, input=value)
                    for path, value, expected in mistakes
                ],
            )
        return self


def _one_teacher(recipe: Recipe) -> list[Mistake]:
    if (recipe.teacher is None) == (recipe.train_teacher is None):
        found = "both" if recipe.teacher else "neither"
        return [(("teacher",), found, "expected exactly one of the sections teacher and train_teacher")]
    return []


def _aesthetic_has_a_source(recipe: Recipe) -> list[Mistake]:
    if recipe.select.min_aesthetic is not None and not recipe.ingest.columns.aesthetic and recipe.select.aesthetic_predictor is None:
        return [
            (
                ("select", "min_aesthetic"),
                recipe.select.min_aesthetic,
                "a threshold needs a score: expected names in ingest.columns.aesthetic, or select.aesthetic_predictor, or null here",
            )
        ]
    return []


def _ingest_drops_only_what_select_would(recipe: Recipe) -> list[Mistake]:
    mistakes: list[Mistake] = []
    if recipe.ingest.min_side_px > recipe.select.min_side_px:
        expected = f"would drop rows that select keeps: expected at most select.min_side_px = {recipe.select.min_side_px}"
        mistakes.append((("ingest", "min_side_px"), recipe.ingest.min_side_px, expected))
    early, late = recipe.ingest.min_aesthetic, recipe.select.min_aesthetic
    if early is not None and (late is None or early > late):
        expected = f"would drop rows that select keeps: expected at most select.min_aesthetic = {late}, or null"
        mistakes.append((("ingest", "min_aesthetic"), early, expected))
    return mistakes


def _batches_divide(recipe: Recipe) -> list[Mistake]:
    mistakes: list[Mistake] = []
    for section in ("lightning", "lcm"):
        config = getattr(recipe, section)
        if config is not None and config.batch_size % config.accumulation_steps:
            expected = f"expected a divisor of {section}.batch_size = {config.batch_size}"
            mistakes.append(((section, "accumulation_steps"), config.accumulation_steps, expected))
        if config is not None and config.warmup_steps >= config.training_steps:
            expected = f"the run would end inside its warm-up: expected fewer than {section}.training_steps = {config.training_steps}"
            mistakes.append(((section, "warmup_steps"), config.warmup_steps, expected))
    return mistakes


def _students_exist_where_needed(recipe: Recipe) -> list[Mistake]:
    if recipe.publish is None:
        return []
    if recipe.evaluate is None:
        return [(("publish",), recipe.publish.name, "the model card needs figures: expected a section evaluate")]
    if recipe.lightning is None and recipe.lcm is None and recipe.train_teacher is None:
        return [(("publish",), recipe.publish.name, "no stage makes a student: expected a section lightning or lcm")]
    return []


Recipe.cross_checks.extend(
    [_one_teacher, _aesthetic_has_a_source, _ingest_drops_only_what_select_would, _batches_divide, _students_exist_where_needed]
)
