"""What the report says, as plain data: `report.json`, from which the page and the model card are made."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from schemas.evaluation import EvaluateConfig
from schemas.manifest import ImageShards, Latents, Manifest, ReferenceSet, Selection, StudentManifest, Teacher
from stages.evaluate.also import Also
from stages.evaluate.fid import bias_warning
from stages.evaluate.metrics.catalogue import METRICS
from stages.evaluate.prompts import PromptSet
from stages.evaluate.rows import TEACHER, Finetuned, Row
from stages.evaluate.scoring import Score
from stages.evaluate.timing import Timing
from stages.registry import stage
from stages.reports.ancestry import Find, ancestors, lineage_row
from stages.reports.ancestry import Row as LineageRow
from stages.reports.page import plural

Scores = Mapping[str, Mapping[str, Score]]
"""Row name -> metric -> score."""


@dataclass(frozen=True)
class Features:
    """The feature network that pictures were shown to."""

    title: str
    dimensions: int
    weights: str | None = None
    """Digest of its weights where the recipe names them."""


@dataclass(frozen=True)
class Measured:
    """All that one evaluation found out."""

    identity: str
    config: EvaluateConfig
    seed: int
    rows: tuple[Row, ...]
    scores: Scores
    prompts: PromptSet
    extractor: Features
    real_images: int
    timings: Mapping[str, Timing] = field(default_factory=dict)
    """By row, where the recipe asks for them."""
    transfers: tuple[Mapping[str, Any], ...] = ()
    """Of every entry of `evaluate.transfer`: its name, what is changed, and its rows with their FID to the changed teacher."""
    also: tuple[Also, ...] = ()
    """Checkpoints from outside that have rows."""


@dataclass(frozen=True)
class Sources:
    """Manifests of what was evaluated, and where to look for what that was made from."""

    teacher: Manifest[Teacher]
    latents: Manifest[Latents]
    images: Manifest[ImageShards]
    selection: Manifest[Selection]
    students: Mapping[str, StudentManifest]
    finetuned: Mapping[str, Finetuned]
    reference: Manifest[ReferenceSet] | None
    inputs: Mapping[str, str]
    """Of the evaluation: identities of artifacts and digests of files from elsewhere, by name."""
    find: Find
    """How the store finds what these were made from."""

    def nearest(self) -> list[Manifest[Any]]:
        """What was evaluated, and against what."""
        chain: list[Manifest[Any]] = [self.images, self.selection, self.teacher, self.latents]
        chain += [*self.students.values(), *self.finetuned.values()]
        return chain if self.reference is None else [*chain, self.reference]


def summarise(measured: Measured, sources: Sources) -> dict[str, Any]:
    """Return the content of `report.json`: no dates, hosts or places, so equal inputs give equal bytes."""
    teacher = sources.teacher.content
    return {
        "schema_version": 1,
        "artifact": measured.identity,
        "verdict": verdict(
            measured.rows, {row: {metric: score.value for metric, score in found.items()} for row, found in measured.scores.items()}
        ),
        "teacher": {
            "architecture": teacher.architecture,
            "prediction_type": teacher.prediction_type,
            "resolution": teacher.resolution,
            "unet_parameters": teacher.parameters.get("unet"),
            "weights_digest": teacher.weights_digest,
        },
        "samples": {
            "images": len(measured.prompts.images),
            "distinct_prompts": measured.prompts.distinct,
            "prompts_from": measured.prompts.source,
            "prompts_sha256": measured.prompts.digest,
            "prompts_file_sha256": sources.inputs.get("prompts"),
            "examples": list(dict.fromkeys(measured.prompts.images))[: measured.config.grid_prompts],
            "seed": measured.seed,
            "teacher_guidance_scale": measured.config.teacher_guidance_scale,
        },
        "extractor": {"name": measured.config.extractor, **asdict(measured.extractor)},
        "real_images": measured.real_images,
        "real_images_from": "selection" if sources.reference is None else "reference",
        "metrics": {name: METRICS[name].title for name in measured.scores[measured.rows[0].name]},
        "intervals": {"confidence": measured.config.confidence, "resamples": measured.config.resamples},
        "rows": [_row(row, measured) for row in measured.rows],
        **({"transfers": list(measured.transfers)} if measured.transfers else {}),
        "warnings": warnings(measured),
        "funnel": funnel(sources),
        "lineage": lineage(measured.identity, sources),
        "config": measured.config.identity_fields(),
    }


def _row(row: Row, measured: Measured) -> dict[str, Any]:
    scores, timing = measured.scores[row.name], measured.timings.get(row.name)
    also = next((also for also in measured.also if also.config.name == row.model), None)
    return {
        "name": row.name,
        "model": row.model,
        "family": row.family,
        "steps": row.steps,
        "timesteps": list(row.timesteps),
        "sampler": row.sampler,
        "prediction_type": row.prediction_type,
        "guidance_scale": row.guidance_scale,
        "scores": {metric: score.value for metric, score in scores.items()},
        "intervals": {metric: [score.low, score.high] for metric, score in scores.items()},
        **({} if timing is None else {"timing": timing.as_json()}),
        **({} if also is None else {"note": also.note, "weights_digest": also.weights}),
    }


def warnings(measured: Measured) -> list[str]:
    """What a reader must know before believing the figures."""
    found: list[str] = []
    images = len(measured.prompts.images)
    biased = bias_warning(min(images, measured.real_images), measured.extractor.dimensions)
    if biased is not None:
        floor = measured.scores[measured.rows[0].name]["fid_teacher"].value
        found.append(
            f"{biased} Two sets of the teacher's own samples, {images} each, are at FID {figure(floor)} although they are of one model: so much of "
            "a figure here is bias. Use these figures to rank rows of this table, which share prompts and noise, and never against figures from "
            "elsewhere."
        )
    if measured.prompts.distinct * measured.config.images_per_prompt < images:
        found.append(
            f"Only {measured.prompts.distinct} distinct prompts exist for the {images} images of a row: "
            "they are repeated, each time with another starting noise."
        )
    if measured.config.extractor != "inception":
        found.append(f"Features are those of {measured.extractor.title}, not of Inception: the scale differs from published FIDs.")
    return found + [also.note for also in measured.also]


def verdict(rows: Sequence[Row], scores: Mapping[str, Mapping[str, float]]) -> str:
    """One paragraph in figures: the students beside the teacher at the same step count."""
    reference = rows[0]
    teacher = {row.steps: scores[row.name] for row in rows if row.model == TEACHER}
    students = [row for row in rows if row.model != TEACHER]
    if not students:
        real = ", ".join(f"{figure(values['fid_real'])} in {plural(steps, 'step')}" for steps, values in teacher.items())
        return f"The teacher alone, measured against real images: FID {real}."
    sentences: list[str] = []
    for steps in headline_steps(students):
        best = min((row for row in students if row.steps == steps), key=lambda row: (scores[row.name]["fid_teacher"], row.name))
        value = scores[best.name]["fid_teacher"]
        whose = f"the teacher's own samples in {plural(reference.steps, 'step')}" if not sentences else "them"
        sentence = f"In {plural(steps, 'step')} the student {best.family} comes within FID {figure(value)} of {whose}"
        if not sentences:
            sentence += f", whose distance to others of their kind is {figure(scores[reference.name]['fid_teacher'])}"
        if steps in teacher and steps != reference.steps:
            alone = teacher[steps]["fid_teacher"]
            change = f"{abs(1 - value / alone):.0%} {'lower' if value < alone else 'higher'}" if alone else "from zero"
            sentence += f"; the teacher itself in {plural(steps, 'step')} is at {figure(alone)} ({change} for the student)"
        sentences.append(sentence + ".")
    best = min(students, key=lambda row: (scores[row.name]["fid_real"], row.name))
    sentences.append(
        f"Against real images the best student is {best.family} in {plural(best.steps, 'step')}, FID {figure(scores[best.name]['fid_real'])}; "
        f"the teacher's {plural(reference.steps, 'step')} score {figure(scores[reference.name]['fid_real'])}."
    )
    return " ".join(sentences)


def headline_steps(students: Sequence[Row]) -> list[int]:
    """The step counts a reader asks for first: 4 and 1, or the fewest there are."""
    counts = sorted({row.steps for row in students})
    return [steps for steps in (4, 1) if steps in counts] or counts[:1]


def funnel(sources: Sources) -> list[dict[str, Any]]:
    """From rows of the URL table to training samples: each station's count, and what was lost before it, by reason."""
    shards, selection = sources.images.content, sources.selection.content
    wanted = shards.rows_in_table - sum(shards.rows_dropped.values())
    stations: list[dict[str, Any]] = [
        {"label": "rows of the table", "count": shards.rows_in_table, "lost": {}},
        {"label": "worth downloading", "count": wanted, "lost": dict(sorted(shards.rows_dropped.items()))},
        {"label": "images downloaded", "count": shards.images, "lost": dict(sorted(shards.failures.items()))},
        {"label": "images selected", "count": selection.images, "lost": dict(sorted(selection.dropped.items()))},
    ]
    stations.append({"label": "samples encoded", "count": sources.latents.content.samples, "lost": {}})
    return stations


def lineage(identity: str, sources: Sources) -> list[LineageRow]:
    """The artifacts behind the report, each after what it was made from, and the evaluation itself."""
    nearest = sources.nearest()
    named = set(sources.inputs.values())
    inputs = dict(sources.inputs) | {found.lineage.node: found.identity for found in nearest if found.identity not in named}
    own: LineageRow = {
        "node": "evaluate",
        "kind": "evaluation",
        "identity": identity,
        "stage": "evaluate",
        "revision": stage("evaluate").revision,
    }
    return [*map(lineage_row, ancestors(nearest, sources.find)), {**own, "inputs": inputs}]


def figure(value: float) -> str:
    """A score as people read it: three significant digits, two decimals at most."""
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"
