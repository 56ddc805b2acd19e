"""What `benchmarks.train_step` trains: a denoiser, an encoded set in shards on a store, and the settings of a recipe."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from infra.progress import NullProgress, Progress
from infra.store import ArtifactStore
from infra.torchvision_ops import define_missing_ops
from schemas.base import digest
from schemas.loading import load_recipe
from schemas.manifest import Latents, Lineage
from stages.diffusion.denoiser import UNetDenoiser
from stages.diffusion.prediction import prediction_type
from stages.diffusion.schedule import NoiseSchedule
from stages.latents import LatentSet
from stages.workspace import Workspace

define_missing_ops()

from diffusers import UNet2DConditionModel  # noqa: E402 - after the operators that it asks for

RECIPES: Final = Path(__file__).parents[1] / "recipes"
TINY_TEACHER: Final = RECIPES / "tiny_teacher"
SHARD_SAMPLES: Final = 128
BETAS: Final = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}

SDXL: Final[dict[str, Any]] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
"""What the UNet of stabilityai/stable-diffusion-xl-base-1.0 differs in from diffusers' defaults (its unet/config.json)."""

SMALL: Final[dict[str, Any]] = SDXL | {
    "sample_size": 16,
    "block_out_channels": (32, 64, 128),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 8),
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
"""The same shape with few channels."""


@dataclass(frozen=True)
class Setup:
    """Everything that the cases have in common."""

    teacher: UNetDenoiser
    latents: LatentSet
    training: dict[str, Any]
    """Fields of `TrainingConfig`."""
    lora_rank: int
    device: torch.device
    folder: Path

    @classmethod
    def tiny(cls, folder: Path, steps: int) -> Self:
        """Networks of recipes/tiny_teacher; batch, rank, precision and checkpoints of recipes/tiny.yaml. On the CPU."""
        unet = UNet2DConditionModel.from_pretrained(TINY_TEACHER / "unet", local_files_only=True)
        section = load_recipe(RECIPES / "tiny.yaml").lightning
        assert section is not None
        training = {
            "training_steps": steps,
            "batch_size": section.batch_size,
            "accumulation_steps": section.accumulation_steps,
            "precision": section.precision,
            "gradient_checkpointing": section.gradient_checkpointing,
            "checkpoint_every": section.checkpoint_every,
        }
        return cls._of(unet, folder, training, section.lora_rank, torch.device("cpu"))

    @classmethod
    def sdxl(cls, folder: Path, steps: int, device: torch.device, *, batch_size: int, small: bool = False) -> Self:
        """SDXL's UNet with random weights, in bfloat16 autocast, with recomputed activations; `small` with few channels."""
        torch.manual_seed(0)
        with torch.device(device):
            unet = UNet2DConditionModel(**(SMALL if small else SDXL))
        training = {
            "training_steps": steps,
            "batch_size": batch_size,
            "precision": "bfloat16",
            "gradient_checkpointing": True,
            "checkpoint_every": 10 * steps,  # gigabytes, which the recipe writes every 500 steps
        }
        return cls._of(unet, folder, training, 64, device)

    @classmethod
    def _of(cls, unet: Any, folder: Path, training: dict[str, Any], lora_rank: int, device: torch.device) -> Self:
        unet = unet.to(device).eval().requires_grad_(False).to(memory_format=torch.channels_last)
        teacher = UNetDenoiser(unet, NoiseSchedule.from_scheduler_config(BETAS), prediction_type("epsilon"))
        return cls(teacher, encoded_set(unet.config, folder, 4 * SHARD_SAMPLES), training, lora_rank, device, folder)

    @contextmanager
    def workspace(self, progress: Progress | None = None) -> Iterator[Workspace]:
        """A run of a stage that nobody has begun before."""
        store = ArtifactStore.open(f"file://{self.folder / 'store'}")
        identity = digest("a run")
        scratch = self.folder / "scratch"
        scratch.mkdir(exist_ok=True)
        workspace = Workspace(store, identity, _lineage(), scratch, device=str(self.device), progress=progress or NullProgress())
        workspace.delete_parts([part.name for part in workspace.parts()])
        yield workspace

    def autocast(self) -> AbstractContextManager[Any]:
        """As the loop's."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.training["precision"] == "bfloat16" else nullcontext()


def encoded_set(config: Any, folder: Path, samples: int) -> LatentSet:
    """Random latents and text in shards as `encode` writes them, read as the training stages read them."""
    random = torch.Generator().manual_seed(0)
    side, tokens = config.sample_size, 77
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    shapes = {"latents": (config.in_channels, side, side), "prompt_embeds": (tokens, config.cross_attention_dim), "pooled": (pooled,)}
    target = folder / "latents"
    target.mkdir()
    names = []
    for shard in range(samples // SHARD_SAMPLES):
        names.append(f"latents-{shard:05d}.safetensors")
        tensors = {name: torch.randn(SHARD_SAMPLES, *shape, generator=random).half() for name, shape in shapes.items()}
        tensors["time_ids"] = torch.tensor([8 * side, 8 * side, 0, 0, 8 * side, 8 * side]).expand(SHARD_SAMPLES, 6).contiguous()
        save_file(tensors, target / names[-1])
    save_file({name: torch.zeros(1, *shapes[name]) for name in ("prompt_embeds", "pooled")}, target / "unconditional.safetensors")
    shards = [name for name in names for _ in range(SHARD_SAMPLES)]
    rows = [row for _ in names for row in range(SHARD_SAMPLES)]
    place = {"shard": shards, "row": rows, "text_shard": shards, "text_row": rows, "caption": [f"number {i}" for i in range(samples)]}
    pq.write_table(pa.table(place), target / "index.parquet")
    content = Latents(
        samples=samples,
        shards=len(names),
        latent_shape=shapes["latents"],
        text_tokens=tokens,
        text_features=config.cross_attention_dim,
        teacher=digest("teacher"),
    )
    store = ArtifactStore.open(f"file://{folder / 'store'}")
    manifest = store.publish(target, identity=digest("latents"), content=content, lineage=_lineage())
    return LatentSet(store.fetch(manifest), manifest)


def _lineage() -> Lineage:
    return Lineage(stage="benchmark", node="benchmark", revision=1, config={}, inputs={})
