"""Intervals of differences between runs whose rows share prompts and noise: drawn together, prompt by prompt, they are narrower than what the two
figures' own intervals say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safetensors.numpy import load_file

from infra.store import ArtifactStore
from schemas.errors import BadInput
from schemas.evaluation import EvaluateConfig
from schemas.manifest import Manifest
from stages.compare.comparison import Evaluated, Interval, RowKey
from stages.evaluate.metrics.bootstrap import interval
from stages.evaluate.metrics.catalogue import PICTURE_METRICS
from stages.evaluate.past import features_file, numbers_file
from stages.evaluate.scoring import Score, Scoring, Sets
from stages.evaluate.views import read_sets

_REAL: Final = "real"
_HERE: Final = Path()


def paired_intervals(first: Evaluated, other: Evaluated, store: ArtifactStore) -> dict[tuple[RowKey, str], Interval]:
    """By row and metric of both runs' tables, where the other's value less the first's lies in the share of resamples that the first's confidence
    says. Their features are read from the store, and every figure is made again.

    Raises `BadInput` where the runs do not share prompts, noise, the teacher's own samples and the selection's real images.
    """
    scoring = _scoring(first, other, store)
    rows = {(row["family"], row["steps"]): row for row in first.report["rows"]}
    found: dict[tuple[RowKey, str], Interval] = {}
    for row in other.report["rows"]:
        key = (row["family"], row["steps"])
        if key in rows:
            base, own = _scores(first, rows[key], scoring, store), _scores(other, row, scoring, store)
            for metric in base.keys() & own.keys():
                found[key, metric] = interval(own[metric].draws - base[metric].draws, scoring.config.confidence)
    return found


def _scoring(first: Evaluated, other: Evaluated, store: ArtifactStore) -> Scoring:
    """The resampling and the references that both share."""
    manifest, samples = _manifest(first), first.report["samples"]
    reference = f"reference-at-{first.report['rows'][0]['steps']}"
    for name, what in ((reference, "prompts, noise, feature network or teacher"), (_REAL, "the selection's pictures as real images")):
        if name not in manifest.content.rows or manifest.content.rows[name] != _manifest(other).content.rows.get(name):
            raise BadInput(f"--paired: {first.label} and {other.label} do not share {what}; expected evaluations that do")
    config = EvaluateConfig.model_validate(manifest.lineage.config)
    if samples["prompts_from"] == "file" and samples["distinct_prompts"] < config.prompt_count:
        raise BadInput(f"--paired: {first.label}: its file's prompts are repeated; expected as many distinct ones as prompt_count")
    metrics = tuple(metric for metric in config.metrics if metric in _manifest(other).lineage.config["metrics"])
    prompts = [str(image // config.images_per_prompt % samples["distinct_prompts"]) for image in range(samples["images"])]
    references = {"teacher": _sets(first, reference, store), "real": _sets(first, _REAL, store)}
    return Scoring(config.model_copy(update={"metrics": metrics}), prompts, references, samples["seed"])


def _scores(run: Evaluated, row: Mapping[str, Any], scoring: Scoring, store: ArtifactStore) -> Mapping[str, Score]:
    manifest, slug = _manifest(run), row["name"].replace("@", "-at-")
    held = {entry.path for entry in manifest.files}
    numbers = {
        metric: load_file(store.fetch(manifest, [path]) / path)["numbers"]
        for metric, (group, _) in PICTURE_METRICS.items()
        if group in scoring.config.metrics and (path := numbers_file(_HERE, f"{metric}-{slug}").as_posix()) in held
    }
    return scoring.score(_sets(run, slug, store), numbers)


def _sets(run: Evaluated, slug: str, store: ArtifactStore) -> Sets:
    path = features_file(_HERE, slug).as_posix()
    return read_sets(store.fetch(_manifest(run), [path]) / path)


def _manifest(run: Evaluated) -> Manifest[Any]:
    if run.manifest is None:
        raise BadInput(f"--paired: {run.label} is a file; expected artifacts, whose features are on the store")
    return run.manifest
