"""What an artifact is: its kind, its files with size and SHA-256, and where it comes from.

A manifest is the whole of what tasks hand to each other; data stays on the store. The `content` union is closed and typed:
one class a kind, holding the few figures that later stages and people need without opening a file.
"""

from datetime import datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Final, Generic, Literal

from pydantic import AfterValidator
from typing_extensions import TypeVar

from schemas.base import Field, Model, PositiveInt, Sha256, digest

SCHEMA_VERSION: Final = 1


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path or str(PurePosixPath(path)) != path:
        raise ValueError("expected a normalised relative path inside the artifact, such as 'unet/config.json'")
    return path


RelativePath = Annotated[str, AfterValidator(_inside)]


class FileEntry(Model):
    """One file of an artifact."""

    path: RelativePath
    size: Annotated[int, Field(ge=0)]
    """Bytes."""
    sha256: Sha256


class ImageShards(Model):
    """Webdataset tar shards (image, caption, JSON of the row), the places of the pictures in them, `rows`, `failures` and `statistics`."""

    kind: Literal["image_shards"] = "image_shards"
    rows_in_table: int
    rows_dropped: dict[str, int] = {}
    """Rows dropped before download, by reason."""
    images: int
    failures: dict[str, int] = {}
    """Rows that could not be fetched or decoded, by reason."""
    shards: int


class Measurements(Model):
    """`measurements-NNNNN.parquet` and `thumbnails-NNNNN.parquet` for each shard of the images: a row for every picture, in order."""

    kind: Literal["measurements"] = "measurements"
    source: Sha256
    """Identity of the image shards that were measured."""
    images: int
    shards: int


class Selection(Model):
    """`verdicts.parquet`: every picture's measurements, cleaned caption and verdict; `report.html` and `report.json`. The pictures stay in the image
    shards."""

    kind: Literal["selection"] = "selection"
    source: Sha256
    """Identity of the image shards that were judged."""
    images_in: int
    images: int
    dropped: dict[str, int] = {}
    """Images dropped, by the first criterion that failed."""


class Latents(Model):
    """Safetensors shards of latents and, where precomputed, text embeddings; `unconditional.safetensors`, and `index.parquet`."""

    kind: Literal["latents"] = "latents"
    samples: int
    shards: int
    latent_shape: tuple[int, int, int]
    """(C, h, w) of one latent, already multiplied by the teacher's scaling factor."""
    dropped: dict[str, int] = {}
    """Selected pictures that were not encoded, by reason."""
    text: Literal["precomputed", "on_the_fly"] = "precomputed"
    """Whether the shards hold text embeddings, or the teacher's text encoders make them of the captions when they are needed."""
    captions: int = 0
    """Distinct captions; each is encoded and stored once."""
    text_tokens: int
    text_features: int
    teacher: Sha256
    """Identity of the teacher whose VAE and text encoders were used."""


class Teacher(Model):
    """A complete diffusers pipeline folder, copied into the store so that later stages need nothing else."""

    kind: Literal["teacher"] = "teacher"
    architecture: str
    """The pipeline class of diffusers, such as `StableDiffusionXLPipeline`."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"]
    resolution: int
    """Pixels on a side that the UNet was trained for."""
    weights_digest: Sha256
    """Digest over every file of the pipeline: two teachers with equal weights are one teacher."""
    parameters: dict[str, int]
    """Parameter count by component."""


class Pairs(Model):
    """`pairs-NNNNN.safetensors` with `noise` and `outputs`, and `index.parquet` (pair, shard, row, sample, caption).

    Text is not in it: the embeddings of a pair's caption are those of `sample` in the encoded set `latents`, which therefore has to stay. They are
    larger than the pair (SDXL in bfloat16: 318 KB beside two tensors of 262 KB), and a copy would hold each as often as its caption has pairs.
    """

    kind: Literal["pairs"] = "pairs"
    pairs: int
    shards: int
    latent_shape: tuple[int, int, int]
    """(C, h, w) of noise and output, float32; outputs are scaled latents, noise has unit variance."""
    teacher: Sha256
    """Identity of the teacher that drew them."""
    latents: Sha256
    """Identity of the encoded set whose captions they were drawn with: pair n has that of its sample n modulo the number of samples."""
    time_ids: tuple[int, int, int, int, int, int] | None = None
    """What an SDXL-type teacher was told of size and crop, the same for all pairs. None: it is told nothing."""
    sampler: str
    steps: int
    guidance_scale: float
    """Imagen convention; 1 means no guidance."""
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int
    """Of the noise."""
    batch_size: int
    """Pairs that were drawn together, counted from the beginning of each shard."""
    shard_pairs: int
    """Pairs of every shard but the last."""


class StudentContent(Model):
    """What every student says of itself, so that a sampler needs no guess."""

    method: str
    """Family and objective, such as `lightning-mse` or `lcm`."""
    steps: tuple[int, ...]
    """Step counts the student is meant for, largest first."""
    timesteps: dict[int, tuple[int, ...]]
    """The exact timestep grid for each step count, descending."""
    sampler: Literal["trailing", "lcm", "lcm-trailing"]
    """`trailing`: DDIM/Euler on the trailing grid; `lcm`: LCMScheduler; `lcm-trailing`: the same on the trailing grid, or for a single step at a
    timestep of its own."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"]
    guidance_scale: float
    """Imagen-convention scale to sample with, as diffusers' pipelines take it; 1 means no guidance."""
    guidance_range: tuple[float, float] | None = None
    """Lowest and highest scale of the training, where the network is told the scale in the place of guidance (`time_cond_proj_dim` of its
    configuration). None: it is not told."""
    teacher: Sha256
    training_steps: int
    best_step: int | None = None
    """Where the training was looked at: the step of the lowest FID to the teacher on few images, the mean over the step counts looked at."""
    best_fid: float | None = None
    kept: Literal["last", "best"] = "last"
    """Whose weights the student's are: those after the last step, with those of `best_step` in `best/`, or those, with the last in `last/`."""

    @property
    def weights_step(self) -> int:
        """The step of training whose weights are the student's."""
        return self.training_steps if self.kept == "last" or self.best_step is None else self.best_step


class StudentUNet(StudentContent):
    """`unet/` in diffusers layout."""

    kind: Literal["student_unet"] = "student_unet"


class StudentLoRA(StudentContent):
    """`pytorch_lora_weights.safetensors` in diffusers layout, alpha stored."""

    kind: Literal["student_lora"] = "student_lora"
    rank: int
    alpha: float


class FinetunedLoRA(Model):
    """`pytorch_lora_weights.safetensors` in diffusers layout, alpha stored: what the teacher draws changes, its steps and sampler do not."""

    kind: Literal["finetuned_lora"] = "finetuned_lora"
    rank: int
    alpha: float
    samples: int
    """Encoded pictures it was trained on."""
    training_steps: int
    teacher: Sha256


class ReferenceSet(Model):
    """`whole.safetensors`, and `patch.safetensors` where patches were asked for: `features` (N, D) of real images, in the order of their names."""

    kind: Literal["reference_set"] = "reference_set"
    images: int
    extractor: str


class Evaluation(Model):
    """`report.html`, `scores.parquet`, `report.json`, sample grids; the samples and features of every row, and the numbers of its
    single pictures."""

    kind: Literal["evaluation"] = "evaluation"
    scores: dict[str, dict[str, float]]
    """`{"<model>@<steps>": {"fid_teacher": ..., ...}}`."""
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    """Of scores, by the same names: lower and upper end."""
    prompts: int
    rows: dict[str, Sha256] = {}
    """By the name of files (a row's, or the numbers of its pictures), what they follow from: an evaluation that asks for the same takes them over."""


class PublishedModel(Model):
    """A folder that plain diffusers calls load."""

    kind: Literal["published_model"] = "published_model"
    variants: dict[str, dict[str, Any]]
    """By variant name: steps, kind (unet or lora), subfolder, sampler."""


Content = Annotated[
    ImageShards
    | Measurements
    | Selection
    | Latents
    | Teacher
    | Pairs
    | StudentUNet
    | StudentLoRA
    | FinetunedLoRA
    | ReferenceSet
    | Evaluation
    | PublishedModel,
    Field(discriminator="kind"),
]


C = TypeVar("C", bound=Model, default=Content)


class Cost(Model):
    """What making the artifact took, attempts that were interrupted or failed included, but for those that were killed outright. Not part of
    anything's identity."""

    wall_seconds: float = 0.0
    """Summed over all attempts, also those of several workers at one time."""
    gpu_hours: float = 0.0
    """Hours times the GPUs that the stage had."""
    peak_memory_bytes: int = 0
    """Peak resident memory (host) of the largest of the stage's processes that have ended, or of the one that published."""
    peak_device_bytes: int | None = None
    """Peak of what torch allocated on one CUDA device, of the process that published. None: not on CUDA, or not known there."""
    bytes_read: int = 0
    """From the store, by all processes of the stage. What was in this machine's read cache is not read again."""
    bytes_written: int = 0
    """To the store, checkpoints and finished pieces included."""
    attempts: PositiveInt = 1
    """Runs that worked at it; each share of several workers is one."""

    def plus(self, other: "Cost") -> "Cost":
        """Both together: sums of what is spent, the higher of what is a peak."""
        peaks = [peak for peak in (self.peak_device_bytes, other.peak_device_bytes) if peak is not None]
        return Cost(
            wall_seconds=self.wall_seconds + other.wall_seconds,
            gpu_hours=self.gpu_hours + other.gpu_hours,
            peak_memory_bytes=max(self.peak_memory_bytes, other.peak_memory_bytes),
            peak_device_bytes=max(peaks, default=None),
            bytes_read=self.bytes_read + other.bytes_read,
            bytes_written=self.bytes_written + other.bytes_written,
            attempts=self.attempts + other.attempts,
        )


class Lineage(Model):
    """Where an artifact comes from: enough to make it again."""

    stage: str
    """Name of the stage in the registry, such as `lightning`."""
    node: str
    """Name of the step in the plan, such as `lightning-32-8`."""
    revision: int
    """Revision of the stage's code: raised when its results change."""
    config: dict[str, Any]
    """The stage's whole configuration, as JSON."""
    inputs: dict[str, Sha256]
    """Identity of every input artifact, and the content digest of every outside file, by name."""
    teacher_digest: Sha256 | None = None
    source_revision: str = "unknown"
    """Git revision of the project's code."""
    libraries: dict[str, str] = {}
    host: str = ""
    device: str = ""
    finished_at: datetime | None = None
    cost: Cost = Cost()


class Manifest(Model, Generic[C]):
    """An artifact: exists if and only if its manifest does.

    `Manifest` is any artifact; `Manifest[Latents]` is one of that kind, and validating another kind against it is refused.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    identity: Sha256
    content: C
    files: tuple[FileEntry, ...]
    """Sorted by path."""
    lineage: Lineage

    @property
    def kind(self) -> str:
        return str(self.content.kind)  # type: ignore[attr-defined]  # every member of the union has one

    @property
    def bytes(self) -> int:
        """Total size of the artifact's files in bytes."""
        return sum(entry.size for entry in self.files)

    @property
    def files_digest(self) -> str:
        """One digest over every file's path and SHA-256: equal exactly when two artifacts hold equal bytes."""
        return digest([[entry.path, entry.sha256] for entry in self.files])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its JSON: `Manifest[Latents]` is a class that pickle finds by name only where a module's own body was the first to write it."""
        return Manifest.model_validate_json, (self.model_dump_json(),)

    def file(self, path: str) -> FileEntry:
        """Return the entry of one file. Raises `KeyError` naming the artifact."""
        for entry in self.files:
            if entry.path == path:
                return entry
        raise KeyError(f"artifact {self.identity[:12]} ({self.kind}) holds no file {path!r}")


# Each on a line of its own: pydantic reads the source around the first use of such a type, and fails inside a statement.
StudentManifest = Manifest[StudentUNet | StudentLoRA]
"""Of a student of either form."""

EncodedManifest = Manifest[Latents] | Manifest[Pairs]
"""Of what a student is trained on: encoded pictures, or what the teacher itself drew."""
