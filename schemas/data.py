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

    analysis_px: Annotated[int, Field(ge=16)] = 1024
    """Short side at which sharpness is measured (pixels), that of the training, so that it does not depend on the picture's size."""
    thumbnail_px: Annotated[int, Field(ge=8, le=256)] = 96
    """Short side of the thumbnails, in luma, that the selection's report shows (pixels)."""
    aesthetic_predictor: Annotated[str | None, NotIdentity] = None
    """Folder of a LAION aesthetic predictor (CLIP and MLP head) for rows without a score. null: such rows have none."""
    processes: Annotated[int, Field(ge=1), NotIdentity] = 2


class SelectConfig(Model):
    """`select`: images that pass resolution, aesthetics and sharpness."""

    min_side_px: Annotated[int, Field(ge=0)] = 1024
    """Strict lower bound of the short side of the decoded picture (pixels). SDXL-Lightning 3.6: "larger than 1024"."""
    min_aesthetic: float | None = 5.5
    """Strict lower bound of the LAION aesthetic score; a picture without a score is dropped. null: not looked at."""
    min_sharpness: Annotated[float, Field(ge=0)] = 0.04
    """Lower bound of the Laplacian variance over luma variance at `measure.analysis_px`. SDXL-Lightning 3.6 has such a filter; no bound published."""
    min_high_frequency: Annotated[float, Field(ge=0, le=1)] = 0.003
    """Lower bound of the share of spectral energy above half of Nyquist at native size: enlarged pictures have next to none. 0: not looked at."""


class EncodeConfig(Model):
    """`encode`: VAE latents and text embeddings of the selected images."""

    resolution_px: Annotated[int, Field(ge=8)] | None = None
    """Side of the square training crop (pixels). null: the resolution the teacher was trained for."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """The SDXL VAE overflows in float16, so that is no choice."""
    text_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage type of the text embeddings. bfloat16 halves the 630 KB of an SDXL prompt."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    shard_samples: Annotated[int, Field(ge=1)] = 1024
