"""What an encoded sample takes on disk, from a teacher's configuration files alone: no weights, no torch."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from schemas.data import EncodeConfig
from schemas.errors import BadInput
from schemas.teacher import TrainTeacherConfig

CONFIG_FILES: Final = (
    "unet/config.json", "vae/config.json", "text_encoder/config.json", "text_encoder_2/config.json", "tokenizer/tokenizer_config.json",
)  # fmt: skip
"""What is read of a pipeline folder; the second text encoder is there for SDXL-type teachers only."""
_BYTES: Final = {"float32": 4, "bfloat16": 2}
_TIME_IDS: Final = 6


@dataclass(frozen=True)
class EncodedSize:
    """Bytes of one sample in the shards."""

    latents: int
    """Latents and, for SDXL-type teachers, time ids."""
    text: int
    """Text embeddings, where they are stored. An upper bound where captions repeat: a repeated one is stored once."""

    def sample(self, config: EncodeConfig) -> int:
        """Bytes of one sample as the recipe wants it."""
        return self.latents + (self.text if config.text == "precomputed" else 0)

    def shard_samples(self, config: EncodeConfig) -> int:
        """Samples in one shard."""
        return config.shard_samples or max(1, config.shard_mb * 10**6 // self.sample(config))


def encoded_size(folder: Path, config: EncodeConfig) -> EncodedSize:
    """Of a pipeline folder. Raises `BadInput` where a configuration file is missing or does not tell what is needed."""
    try:
        unet, vae, first = (_read(folder / f"{name}/config.json") for name in ("unet", "vae", "text_encoder"))
        tokens = int(_read(folder / "tokenizer" / "tokenizer_config.json")["model_max_length"])
        second = _read(folder / "text_encoder_2" / "config.json") if (folder / "text_encoder_2").is_dir() else None
        downscale = 2 ** (len(vae["block_out_channels"]) - 1)
        side = config.resolution_px // downscale if config.resolution_px is not None else int(unet["sample_size"])
        features = int(first["hidden_size"]) + (0 if second is None else int(second["hidden_size"]))
        pooled = None if second is None else int(second["projection_dim"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{folder}: its configuration files do not tell the size of an encoded sample ({error!r})") from error
    return _size((int(vae.get("latent_channels", 4)), side, side), (tokens, features), pooled, config)


def size_of_trained(teacher: TrainTeacherConfig, config: EncodeConfig) -> EncodedSize:
    """Of a teacher that is yet to be trained."""
    downscale = 2 ** (len(teacher.autoencoder.block_out_channels) - 1)
    side = (config.resolution_px or teacher.resolution_px) // downscale
    features = sum(encoder.hidden_size for encoder in teacher.text_encoders)
    pooled = teacher.text_encoders[1].projection_dim
    return _size((teacher.autoencoder.latent_channels, side, side), (teacher.max_tokens, features), pooled, config)


def _size(latent: tuple[int, int, int], text: tuple[int, int], pooled: int | None, config: EncodeConfig) -> EncodedSize:
    latents = math.prod(latent) * 4 + (0 if pooled is None else _TIME_IDS * 4)
    return EncodedSize(latents, (math.prod(text) + (pooled or 0)) * _BYTES[config.text_dtype])


def _read(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise TypeError(f"{path.name}: expected a JSON object")
    return value


def human(size: int) -> str:
    """Bytes in powers of ten, as disks are sold."""
    value = float(size)
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "bytes" or value >= 9.95 else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")
