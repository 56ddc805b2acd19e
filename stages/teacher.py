"""The `teacher` stage: inspect a diffusers pipeline wherever it lies, and copy what makes it one, and nothing else, into the store."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from infra.outside import HubModel, content_digest, local_copy
from schemas.base import Model, digest
from schemas.errors import BadInput, RunFailed
from schemas.manifest import Manifest, Teacher
from schemas.recipe import Recipe
from schemas.teacher import TeacherConfig
from stages.diffusion.facts import MODEL_INDEX, components, inspect
from stages.diffusion.weights import find_weights
from stages.workspace import Workspace

logger = logging.getLogger(__name__)

_SIDE_FILES = (".json", ".txt", ".model")
"""Configurations and vocabularies. Weights go by their own rule; everything else (pickles, code, pictures) stays behind."""


class Inputs(Model):
    """Nothing from the store: the pipeline lies outside."""


def preflight(config: TeacherConfig, outside: Mapping[str, str], recipe: Recipe) -> None:
    """Inspect a pipeline on this machine without loading it. Raises `BadInput` as `run` does, and as `encode` does for a resolution that its VAE
    cannot take; one that lies elsewhere is looked at when it comes."""
    folder = Path(outside["source"].removeprefix("file://"))
    if folder.is_file():
        raise _is_a_file(outside["source"])
    if folder.is_dir():
        with _said_of_the_source():
            pipeline_files(folder, config.variant)
            facts = inspect(folder) if config.variant is None else None
        if facts is not None:
            check_resolution(recipe.encode.resolution_px or facts.resolution, facts.resolution // facts.latent_shape[1])


def run(config: TeacherConfig, inputs: Inputs, workspace: Workspace) -> Manifest[Teacher]:  # noqa: ARG001  # every stage's signature
    """Copy the pipeline at `config.source` (a folder, an address on object storage, a hub id) into the store and say what it is.

    Weights are taken from safetensors files of `config.variant` only, and named as a plain pipeline's; no code of the pipeline is run. Raises
    `BadInput` for a pipeline, component or setting that is not supported, for missing files, for weights that are no safetensors or cut short.
    """
    address = workspace.outside.get("source", config.address)
    promised = workspace.lineage.inputs.get("source")
    if HubModel.parse(address) and promised not in (None, content_digest(address)):
        raise RunFailed(f"{address}: the hub has another commit than when the plan was made; run again, or set teacher.revision")
    with workspace.folder("download") as download, workspace.folder("teacher") as target:
        source = local_copy(address, download, lambda path: is_wanted(path, config.variant))
        if not source.is_dir():
            raise _is_a_file(address)
        with _said_of_the_source():
            files = pipeline_files(source, config.variant)
        for done, _ in enumerate(copy_pipeline(files, target, config.variant), start=1):
            workspace.progress.update(done, len(files), "files")
        with _said_of_the_source():
            content = describe(target)
        logger.info("%s: %s, %s, %d px", address, content.architecture, content.prediction_type, content.resolution)
        return Manifest[Teacher].model_validate(workspace.publish(target, content).model_dump())


def check_resolution(side: int, downscale: int) -> None:
    """Raise `BadInput` for a training resolution (pixels) that is no multiple of the VAE's factor."""
    if side % downscale:
        raise BadInput(f"encode.resolution_px = {side}: expected a multiple of {downscale}, the VAE's factor")


@contextmanager
def _said_of_the_source() -> Iterator[None]:
    """Put the recipe's field before what is wrong with the pipeline it names."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"teacher.source: {error}") from error


def _is_a_file(address: str) -> BadInput:
    return BadInput(f"teacher.source: {address}: found a file, expected a pipeline folder in diffusers layout")


def describe(folder: Path) -> Teacher:
    """What a pipeline folder is, as an artifact says it. Raises `BadInput` as `stages.diffusion.facts.inspect` does."""
    facts = inspect(folder)
    return Teacher.model_validate(
        {
            "architecture": facts.architecture,
            "prediction_type": facts.prediction_type,
            "resolution": facts.resolution,
            "weights_digest": weights_digest(folder),
            "parameters": dict(facts.parameters),
        }
    )


def weights_digest(folder: Path) -> str:
    """Digest over the relative path and SHA-256 of every file in `folder`: equal for equal teachers."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest([[path.relative_to(folder).as_posix(), sha256(path)] for path in files])


def pipeline_files(folder: Path, variant: str | None = None) -> dict[str, Path]:
    """Files that make the pipeline in `folder`, by the relative path each gets in the artifact.

    That is the index, configurations, vocabularies, and one set of safetensors weights a network. Raises `BadInput`.
    """
    files = {MODEL_INDEX: folder / MODEL_INDEX}
    for component in components(folder):
        if not (folder / component).is_dir():
            raise BadInput(f"{folder / component}: missing; expected a complete pipeline in diffusers layout")
        for path in (folder / component).iterdir():
            if path.suffix in _SIDE_FILES and ".index." not in path.name and path.is_file():
                files[f"{component}/{path.name}"] = path
        if not component.startswith(("tokenizer", "scheduler")):
            weights = find_weights(folder / component, variant)
            for path in (*weights.files, *((weights.index,) if weights.index else ())):
                files[f"{component}/{weights.plain_name(path)}"] = path
    return files


def is_wanted(path: str, variant: str | None) -> bool:
    """Whether a file of a remote repository may belong to the pipeline: a hub repository often holds a model several times over."""
    name = PurePosixPath(path)
    if len(name.parts) == 1:
        return path == MODEL_INDEX
    if len(name.parts) > 2:
        return False
    if name.suffix == ".safetensors":
        return (f".{variant}" in name.name) if variant is not None else name.name.count(".") == 1
    return name.suffix in _SIDE_FILES


def copy_pipeline(files: Mapping[str, Path], target: Path, variant: str | None = None) -> Iterator[str]:
    """Copy the `pipeline_files` of a pipeline to the folder `target`; yields each file's name when it is there."""
    for name, path in sorted(files.items()):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        _copy(path, target / name, variant)
        yield name


def _copy(source: Path, target: Path, variant: str | None) -> None:
    """Copy a file; an index of shards gets the shards' plain names, and a pipeline's index only what was copied."""
    if ".safetensors.index" in source.name and variant is not None:
        index = json.loads(source.read_text(encoding="utf-8"))
        index["weight_map"] = {tensor: shard.replace(f".{variant}", "", 1) for tensor, shard in index["weight_map"].items()}
        _write_json(target, index)
    elif target.name == MODEL_INDEX:
        index = json.loads(source.read_text(encoding="utf-8"))
        kept = components(source.parent)
        # A component that stays behind (safety checker, feature extractor, image encoder) is optional to the pipeline: null in its index.
        _write_json(target, {key: [None, None] if isinstance(value, list) and key not in kept else value for key, value in index.items()})
    else:
        shutil.copyfile(source, target)


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
