"""A tiny random teacher and an encoded set of it, published on a store in a folder: what the training stages read."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from infra.store import ArtifactStore, StoreSettings
from schemas.base import Model, digest
from schemas.manifest import Latents, Lineage, Manifest, Teacher
from stages.diffusion.pipeline import TeacherPipeline
from stages.workspace import Workspace
from tests import tiny_pipelines

CAPTIONS = ("the red cat", "the dog", "a red re", "the the", "cat", "dog", "red", "a", "the car", "re the red", "cat cat", "dog cat", "x")


def open_store(folder: Path) -> ArtifactStore:
    return ArtifactStore.open(str(folder / "store"), StoreSettings(cache_dir=folder / "cache"))


def workspace(folder: Path, *, config: Model, seed: int = 3) -> Workspace:
    """The surroundings of one run of a training stage; its identity follows from config and seed."""
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    identity = digest([type(config).__name__, config.identity_fields(), seed])
    return Workspace(open_store(folder), identity, _lineage(), scratch, seed=seed)


def make_teacher(folder: Path, kind: tiny_pipelines.Kind | Path) -> Manifest[Teacher]:
    """A random teacher of a kind, or the one in a folder."""
    source = kind if isinstance(kind, Path) else tiny_pipelines.save(kind, folder / f"teacher-{kind}")
    teacher = TeacherPipeline.load(source)
    content = Teacher(
        architecture=teacher.architecture,
        prediction_type=teacher.prediction.name,  # type: ignore[arg-type]
        resolution=teacher.resolution,
        weights_digest=digest(str(kind)),
        parameters={},
    )
    return open_store(folder).publish(source, identity=digest(["teacher", str(kind)]), content=content, lineage=_lineage())


def make_latents(folder: Path, teacher: Manifest[Teacher]) -> Manifest[Latents]:
    """Random latents of unit variance, with the teacher's own embeddings of `CAPTIONS`."""
    target = folder / f"latents-{teacher.identity[:8]}"
    target.mkdir()
    content = write_latents(target, TeacherPipeline.load(open_store(folder).fetch(teacher)), CAPTIONS, teacher.identity)
    return open_store(folder).publish(target, identity=digest(["latents", teacher.identity]), content=content, lineage=_lineage())


def write_latents(target: Path, pipeline: TeacherPipeline, captions: Sequence[str], teacher: str) -> Latents:
    """Write an encoded set of random latents into a folder."""
    conditioning, unconditional = pipeline.conditioning(captions), pipeline.unconditional()
    latents = torch.randn(len(captions), *pipeline.latent_shape, generator=torch.Generator().manual_seed(11))
    tensors = {"latents": latents, "prompt_embeds": conditioning.prompt_embeds}
    empty = {"prompt_embeds": unconditional.prompt_embeds}
    if conditioning.pooled is not None and unconditional.pooled is not None and conditioning.time_ids is not None:
        tensors |= {"pooled": conditioning.pooled, "time_ids": conditioning.time_ids}
        empty["pooled"] = unconditional.pooled
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "latents-00000.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in empty.items()}, target / "unconditional.safetensors")
    count = len(captions)
    index = {"shard": ["latents-00000.safetensors"] * count, "row": list(range(count)), "key": [f"{i:08d}" for i in range(count)]}
    text = {"caption": list(captions), "text_shard": index["shard"], "text_row": index["row"]}
    pq.write_table(pa.table(index | text), target / "index.parquet")
    return Latents(
        samples=count,
        shards=1,
        latent_shape=pipeline.latent_shape,
        text_tokens=conditioning.prompt_embeds.shape[1],
        text_features=conditioning.prompt_embeds.shape[2],
        teacher=teacher,
    )


def _lineage() -> Lineage:
    return Lineage(stage="test", node="test", revision=1, config={}, inputs={})
