"""Recipe sections of the data stages: `ingest`, `measure`, `select`, `encode`."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import ValidationInfo, field_validator

from schemas.base import Field, Mistake, Model, NotIdentity

Fraction = Annotated[float, Field(ge=0, le=1)]


class ColumnMap(Model):
    """Which column of the table says what. Each field lists names tried in order, without regard to case, first found.

    The defaults are the names of LAION-5B, LAION-Aesthetics and COYO-700M. Names given in a recipe are tried before them, so a recipe names only
    what is new; an explicit empty list means: there is none.
    """

    url: tuple[str, ...] = ("url",)
    caption: tuple[str, ...] = ("caption", "text", "top_caption")
    width: tuple[str, ...] = ("width", "original_width")
    """Pixels, as the table states them; the picture itself is judged later."""
    height: tuple[str, ...] = ("height", "original_height")
    aesthetic: tuple[str, ...] = ("aesthetic", "aesthetic_score", "aesthetic_score_laion_v2")
    similarity: tuple[str, ...] = ("similarity", "clip_similarity", "clip_similarity_vitb32", "clip_similarity_vitl14")
    """Cosine of the CLIP embeddings of picture and caption."""
    watermark: tuple[str, ...] = ("watermark", "pwatermark", "watermark_score")
    """Probability of a watermark."""
    unsafe: tuple[str, ...] = ("unsafe", "punsafe", "nsfw_score_opennsfw2")
    """Probability of content that is not safe for work."""
    nsfw: tuple[str, ...] = ("nsfw",)
    """Label of the safety of content: UNLIKELY, UNSURE or NSFW in LAION-5B."""

    @field_validator("*", mode="after")
    @classmethod
    def _before_the_defaults(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        defaults: tuple[str, ...] = cls.model_fields[info.field_name or ""].default
        given = {name.lower() for name in names}
        return (*names, *(name for name in defaults if name.lower() not in given)) if names else ()


class IngestConfig(Model):
    """`ingest`: URL table to webdataset shards of downloaded images."""

    table: Annotated[str, NotIdentity]
    """Path or address (local, s3://) of a parquet or csv file, or folder of parquet. Its content is part of the identity, not its place."""
    columns: ColumnMap = ColumnMap()
    min_side_px: Annotated[int, Field(ge=0)] = 1024
    """Rows whose stated short side is not strictly above this are dropped before download (pixels). SDXL-Lightning 3.6."""
    min_aesthetic: float | None = 5.5
    """Rows whose stated aesthetic score is not strictly above this are dropped before download. SDXL-Lightning 3.6. null: not looked at."""
    min_similarity: float | None = None
    """Rows whose stated CLIP similarity is below this are dropped before download. null: not looked at (LAION-5B keeps .28 and above itself)."""
    max_watermark: Fraction | None = 0.8
    """Rows whose stated probability of a watermark is not strictly below this are dropped before download. LAION-Aesthetics. null: not looked at."""
    max_unsafe: Fraction | None = 0.5
    """Rows whose stated probability of unsafe content is not strictly below this are dropped before download. LAION-Aesthetics; COYO-700M holds none
    above it. null: not looked at."""
    drop_nsfw: tuple[str, ...] = ("NSFW",)
    """Rows with one of these safety labels, whatever their case, are dropped before download. UNSURE is the label that may be added."""
    shard_images: Annotated[int, Field(ge=1)] = 1000
    """Images in one webdataset shard."""
    max_failed_fraction: Fraction = 0.5
    """The run stops where more than this share of the downloads failed: web tables age, but a dead proxy must not pass for them."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 10
    """For one try of one file, from the connection to the last byte, redirects included."""
    retries: Annotated[int, Field(ge=0)] = 1
    """Further tries of one address by the downloader."""
    max_file_bytes: Annotated[int, Field(ge=1)] = 64 * 2**20
    """Larger files are refused. A process of the downloader may hold two for each of its threads."""
    allow_private_addresses: bool = False
    """Whether URLs on loopback and private networks may be fetched. The demo, which serves its own pictures, needs it."""
    distributor: Annotated[Literal["multiprocessing", "pyspark", "ray"], NotIdentity] = "multiprocessing"
    """img2dataset's way to spread downloads: `processes` of this machine, or a Spark or Ray cluster, which their own configuration names (Spark's
    files, RAY_ADDRESS; without it all cores of this machine) and whose machines have this package installed."""
    shared_folder: Annotated[str | None, NotIdentity] = None
    """Path or address (s3://) of a folder that all machines of a cluster read and write, for a chunk's files on their way. null: local scratch."""
    chunk_rows: Annotated[int, Field(ge=1), NotIdentity] = 10_000
    """Rows fetched by one start of the downloader (seconds), and then kept on the store: a killed run loses at most these."""
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


Script = Literal[
    "Latin", "Greek", "Cyrillic", "Armenian", "Georgian", "Arabic", "Hebrew", "Devanagari", "Bengali", "Tamil", "Thai", "Han", "Hiragana", "Katakana",
    "Hangul",
]  # fmt: skip
"""Unicode's name of a script."""


class CaptionRules(Model):
    """Which rules captions go through, cleaning first: a caption that a rule changes is counted under the rule's name."""

    unescape_html: bool = True
    """Entities back to characters, as often as they were escaped; tags away."""
    normalise_unicode: bool = True
    """NFC, which CLIP's own tokenizer applies. NFKC would rewrite what a caption says: x² to x2, ½ to 1⁄2, ™ to TM."""
    strip_control: bool = True
    """Control and invisible characters, text-direction marks, private use, and what could not be decoded."""
    strip_urls: bool = True
    """Web and mail addresses."""
    strip_file_names: bool = True
    """IMG_1234.JPG, DSC00012, holiday.png."""
    strip_camera: bool = True
    """Cameras and exposures as written by a camera, such as: Canon EOS 5D, f/2.8, 1/200s, ISO 100. A camera within a sentence stays."""
    strip_boilerplate: bool = True
    """Stock photo, royalty free, Getty Images, | Flickr and their like."""
    strip_sizes: bool = True
    """1920x1080, 300 dpi, 2.4 MB."""
    strip_dates: bool = True
    """Dates and times."""
    tidy_punctuation: bool = True
    """What stripping leaves: empty brackets, separators with nothing between them or at an end."""
    collapse_spaces: bool = True
    """Any run of white space to one space."""
    empty: bool = True
    """Drop: nothing is left."""
    too_short: bool = True
    """Drop: fewer than `min_characters`."""
    all_numbers: bool = True
    """Drop: not one letter (numbers, signs, emoji)."""
    wrong_script: bool = True
    """Drop: fewer than half of the letters are of `scripts`."""


class CaptionConfig(Model):
    """How captions are cleaned, and which are dropped."""

    rules: CaptionRules = CaptionRules()
    min_characters: Annotated[int, Field(ge=1)] = 5
    """Of the cleaned caption. LAION-400M dropped texts of fewer than 5."""
    max_characters: Annotated[int, Field(ge=16, le=10_000)] = 1000
    """A longer caption is cut here: CLIP's text encoders read 77 tokens, some 300 characters."""
    scripts: Annotated[tuple[Script, ...], Field(min_length=1)] = ("Latin",)
    """What the teacher's text encoders know. SDXL's learned from English captions: other scripts fall apart into bytes that mean nothing to them."""


def _lengths_leave_room(captions: CaptionConfig) -> Iterator[Mistake]:
    if captions.min_characters > captions.max_characters:
        expected = f"every caption would be too short: expected at most max_characters = {captions.max_characters}"
        yield ("min_characters",), captions.min_characters, expected


CaptionConfig.cross_checks = (_lengths_leave_room,)


class SelectConfig(Model):
    """`select`: images that pass resolution, aesthetics, sharpness and what the table says of them; captions cleaned, doubles dropped."""

    min_side_px: Annotated[int, Field(ge=0)] = 1024
    """Strict lower bound of the short side of the decoded picture (pixels). SDXL-Lightning 3.6: "larger than 1024"."""
    min_aesthetic: float | None = 5.5
    """Strict lower bound of the LAION aesthetic score; a picture without a score is dropped. null: not looked at."""
    min_sharpness: Annotated[float, Field(ge=0)] = 0.04
    """Lower bound of the Laplacian variance over luma variance at `measure.analysis_px`. SDXL-Lightning 3.6 has such a filter; no bound published."""
    min_high_frequency: Annotated[float, Field(ge=0, le=1)] = 0.003
    """Lower bound of the share of spectral energy above half of Nyquist at native size: enlarged pictures have next to none. 0: not looked at."""
    max_watermark: Fraction | None = 0.5
    """Strict upper bound of the watermark probability, as in laion-improved-aesthetics, which Stable Diffusion 1 was trained on; a row that has
    none passes. null: not looked at."""
    max_unsafe: Fraction | None = 0.5
    """Strict upper bound of LAION's unsafe probability; a row that has none passes. null: not looked at."""
    drop_nsfw: tuple[Literal["UNLIKELY", "UNSURE", "NSFW"], ...] = ("NSFW",)
    """Labels of LAION's NSFW column whose rows are dropped; a row without a label passes."""
    min_similarity: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Lower bound of the CLIP similarity of picture and caption (LAION-5B keeps .28 and above itself); a row that has none passes. null: not looked
    at."""
    max_hash_distance: Annotated[int, Field(ge=0, le=8)] | None = 4
    """Pictures whose 64-bit perceptual hashes differ in at most so many bits are one picture, of which the largest stays. JPEG at quality 20 and
    shrinking to a quarter move a photograph's by 2 bits at most, 15 % more light by 4; the distances are even. null: only equal files are one."""
    captions: CaptionConfig = CaptionConfig()


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
