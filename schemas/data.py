"""Recipe sections of the data stages: `ingest`, `measure`, `select`, `encode`."""

from typing import Annotated, Literal

from schemas.base import Field, Model, NotIdentity

Fraction = Annotated[float, Field(ge=0, le=1)]


class ColumnMap(Model):
    """Which column of the table says what. Each field lists names tried in order, without regard to case; empty means: there is none.

    The defaults are the names of LAION-5B, LAION-Aesthetics and COYO-700M.
    """

    url: tuple[str, ...] = ("url",)
    caption: tuple[str, ...] = ("caption", "text", "top_caption")
    width: tuple[str, ...] = ("width", "original_width")
    height: tuple[str, ...] = ("height", "original_height")
    aesthetic: tuple[str, ...] = ("aesthetic", "aesthetic_score", "aesthetic_score_laion_v2")


class IngestConfig(Model):
    """`ingest`: URL table to webdataset shards of downloaded images."""

    table: Annotated[str, NotIdentity]
    """Path or address (local, s3://) of a parquet or csv file, or folder of parquet. Its content is part of the identity, not its place."""
    columns: ColumnMap = ColumnMap()
    min_side_px: Annotated[int, Field(ge=0)] = 1024
    """Rows whose stated short side is not strictly above this are dropped before download (pixels). SDXL-Lightning 3.6."""
    min_aesthetic: float | None = 5.5
    """Rows whose stated aesthetic score is not strictly above this are dropped before download. SDXL-Lightning 3.6. null: not looked at."""
    shard_images: Annotated[int, Field(ge=1)] = 1000
    """Images in one webdataset shard."""
    max_failed_fraction: Fraction = 0.5
    """The run stops where more than this share of the downloads failed: web tables age, but a dead proxy must not pass for them."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 10
    retries: Annotated[int, Field(ge=0)] = 1
    """Further tries of one address by the downloader."""
    max_file_bytes: Annotated[int, Field(ge=1)] = 64 * 2**20
    allow_private_addresses: bool = False
    """Whether URLs on loopback and private networks may be fetched. The demo, which serves its own pictures, needs it."""
    processes: Annotated[int, Field(ge=1), NotIdentity] = 4
    threads: Annotated[int, Field(ge=1), NotIdentity] = 32


class MeasureConfig(Model):
    """`measure`: what is told of every picture once, so that `select` can judge without reading one again."""

    analysis_px: Annotated[int, Field(ge=16)] = 512
    """Short side at which sharpness is measured (pixels), so that it does not depend on the picture's size."""
    aesthetic_predictor: Annotated[str | None, NotIdentity] = None
    """Folder of a LAION aesthetic predictor (CLIP and MLP head) for rows without a score. null: such rows have none."""
    processes: Annotated[int, Field(ge=1), NotIdentity] = 2


class SelectConfig(Model):
    """`select`: images that pass resolution, aesthetics and sharpness."""

    min_side_px: Annotated[int, Field(ge=0)] = 1024
    """Strict lower bound of the short side of the decoded picture (pixels). SDXL-Lightning 3.6: "larger than 1024"."""
    min_aesthetic: float | None = 5.5
    """Strict lower bound of the LAION aesthetic score; a picture without a score is dropped. null: not looked at."""
    min_sharpness: Annotated[float, Field(ge=0)] = 0.02
    """Lower bound of the Laplacian variance over luma variance at `measure.analysis_px`. SDXL-Lightning 3.6 has such a filter; no bound published."""


class AspectConfig(Model):
    """What becomes of a picture that is not square. It is never enlarged."""

    crop: Literal["centre", "random"] = "centre"
    """Where the square is cut from the picture, shrunk until its short side is `resolution_px`. SDXL-Lightning 3.6 trains on squares only.
    random: at a position that is a function of (seed, key), as SDXL was trained (arXiv 2307.01952, 2.2). Time ids name the crop really used."""
    max_ratio: Annotated[float, Field(ge=1)] | None = None
    """Pictures whose long side is more than this many times the short one are left out, and counted: a square shows little of them.
    null: none are."""


class EncodeConfig(Model):
    """`encode`: VAE latents and text embeddings of the selected images."""

    resolution_px: Annotated[int, Field(ge=8)] | None = None
    """Side of the square training crop (pixels). null: the resolution the teacher was trained for."""
    aspect: AspectConfig = AspectConfig()
    text: Literal["precomputed", "on_the_fly"] = "precomputed"
    """Text embeddings stored, or made by the teacher's text encoders while training: 630 KB of disk a sample (SDXL, float32) against their
    time in every step. `distill plan` prints both costs."""
    text_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage type of the text embeddings. bfloat16 halves the 630 KB of an SDXL prompt."""
    vae_dtype: Literal["float32", "bfloat16", "teacher"] = "float32"
    """Type the VAE computes in. SDXL's overflows in float16, so that is no choice; bfloat16 has float32's range. teacher: float32 where the
    VAE's configuration says `force_upcast`, as SDXL's does, else bfloat16."""
    vae_slicing: bool = False
    """Pictures of a batch go through the VAE one by one: less memory, and the last bits are those of `batch_size` 1."""
    vae_tiling: bool = False
    """Pictures larger than the VAE's own `sample_size` go through it in overlapping tiles that are blended: less memory, slightly other latents."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Pictures that go through the VAE together. The last bits of a latent depend on it, so it is part of the identity. auto: one megapixel on
    a CPU; on a GPU eight, halved until a trial fits its memory."""
    shard_mb: Annotated[int, Field(ge=256, le=1024)] = 512
    """Size of a shard in megabytes (10^6 bytes), counted with the text of every sample: good for object storage."""
    shard_samples: Annotated[int, Field(ge=1)] | None = None
    """Samples in one shard, in place of `shard_mb`."""
    processes: Annotated[int, Field(ge=1), NotIdentity] = 1
    """Shards encoded at the same time, each by a process of its own. On GPUs no more than there are, each with one."""
