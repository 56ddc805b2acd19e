"""What `encode` will take on disk, told before anything runs: with text embeddings stored, and with text made on the fly."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.store import ArtifactStore
from schemas.errors import BadInput
from schemas.manifest import ImageShards, Latents, Manifest, Measurements, Selection
from stages.encoded_size import CONFIG_FILES, EncodedSize, encoded_size, human, size_of_trained
from stages.plan import Plan

Find = Callable[[str], Manifest | None]
"""The finished artifact of a run of the plan, by its name."""


@dataclass(frozen=True)
class EncodeCost:
    """Bytes of a sample, and of all where their number is known."""

    text: str
    """What the recipe asks for: `precomputed` or `on_the_fly`."""
    size: EncodedSize | None
    """None where the teacher's configuration files are not here yet."""
    samples: int | None
    """None where neither a finished stage nor the table tells."""
    source: str
    """What tells the number of samples, such as `select`."""

    def total(self, text: bool) -> int | None:
        """Bytes of all samples with or without stored text. An upper bound where captions repeat, and but for `select` also in the samples."""
        if self.size is None or self.samples is None:
            return None
        return self.samples * (self.size.latents + (self.size.text if text else 0))

    def as_json(self) -> dict[str, Any]:
        """For `distill plan --json`; null for what is not known yet."""
        return {
            "text": self.text,
            "latent_bytes_per_sample": None if self.size is None else self.size.latents,
            "text_bytes_per_sample": None if self.size is None else self.size.text,
            "samples": self.samples,
            "samples_by": self.source,
            "samples_are_a_bound": self.source not in ("encode", "select"),
            "precomputed_bytes": self.total(True),
            "on_the_fly_bytes": self.total(False),
        }

    def sentence(self) -> str:
        """For people."""
        if self.size is None:
            return "encode: its disk cost is known once the teacher's configuration files are here: run distill stage teacher"
        line = f"encode: {human(self.size.text)} text + {human(self.size.latents)} latents a sample"
        precomputed, on_the_fly = self.total(True), self.total(False)
        if precomputed is None or on_the_fly is None or self.samples is None:
            return line
        many = (
            f"{self.samples:,} samples" if self.source in ("encode", "select") else f"at most {self.samples:,} samples (by {self.source})"
        )
        return (
            f"{line}: {many} {human(precomputed)} precomputed, {human(on_the_fly)} on the fly; this recipe: {self.text.replace('_', ' ')}"
        )


def encode_cost(plan: Plan, find: Find, store: ArtifactStore) -> EncodeCost:
    """Look at finished artifacts, else at the teacher's folder and the table's footers. Reads kilobytes."""
    samples, source = _samples(plan, find)
    return EncodeCost(plan.recipe.encode.text, _size(plan, find, store), samples, source)


def _size(plan: Plan, find: Find, store: ArtifactStore) -> EncodedSize | None:
    config, recipe = plan.recipe.encode, plan.recipe
    teacher = find("teacher" if recipe.teacher is not None else "train-teacher")
    try:
        if teacher is not None:
            there = {entry.path for entry in teacher.files}
            return encoded_size(store.fetch(teacher, [path for path in CONFIG_FILES if path in there]), config)
        if recipe.teacher is not None:
            return encoded_size(Path(recipe.teacher.address.removeprefix("file://")), config)
    except BadInput:  # a teacher that lies elsewhere, or whose files do not tell: nothing to plan is wrong with it
        return None
    assert recipe.train_teacher is not None, "the recipe's own check"
    return size_of_trained(recipe.train_teacher, config)


def _samples(plan: Plan, find: Find) -> tuple[int | None, str]:
    for name in ("encode", "select", "measure", "ingest"):
        found = find(name)
        content = None if found is None else found.content
        if isinstance(content, Latents):
            return content.samples, name
        if isinstance(content, Selection | Measurements | ImageShards):
            return content.images, name
    return _table_rows(Path(plan.recipe.ingest.table.removeprefix("file://"))), "the table's rows"


def _table_rows(table: Path) -> int | None:
    """Rows of parquet files on this machine, from their footers; None for anything else."""
    files = sorted(table.rglob("*.parquet")) if table.is_dir() else [table] if table.suffix == ".parquet" and table.is_file() else []
    try:
        return sum(pq.read_metadata(file).num_rows for file in files) if files else None
    except (OSError, pa.ArrowInvalid):  # the stage itself will say what is wrong with it
        return None
