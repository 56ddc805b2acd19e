"""The artifacts behind an evaluation, made in a second: a random tiny teacher, random students, a few real pictures."""

import copy
import hashlib
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import ControlNetModel
from PIL import Image

from infra.store import ArtifactStore
from schemas.base import digest
from schemas.lightning import trailing_timesteps
from schemas.manifest import FinetunedLoRA, ImageShards, Lineage, Manifest, Selection, StudentLoRA, StudentUNet
from stages.diffusion.guidance import add_guidance_input
from stages.diffusion.lora import add_lora, lora_parameters, save_lora
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.schedule import lcm_timesteps
from stages.shards import Sample, ShardWriter
from stages.teacher import describe
from tests.tiny_pipelines import Kind, build
from tests.training.artifacts import write_latents

CAPTIONS = ("red apple", "the cat", "a house", "red car", "the flag")
LCM_GRIDS = {4: (999, 759, 499, 259), 2: (999, 499)}


class Chain:
    """Artifacts of one tiny chain on a store."""

    def __init__(self, store: ArtifactStore, kind: Kind = "sdxl", seed: int = 0) -> None:
        self.store = store
        self.pipeline = build(kind, seed)
        with tempfile.TemporaryDirectory() as name:
            self.pipeline.save_pretrained(Path(name), safe_serialization=True)
            self.teacher: Any = self._publish(Path(name), "teacher", "teacher", describe(Path(name)))
        self.images: Any = self._images()
        self.selection: Any = self._selection()
        self.latents: Any = self._latents()

    def inputs(self, **students: Any) -> dict[str, Any]:
        """Inputs of `evaluate`; the students by node name, with `_` for `-`."""
        named = {name.replace("_", "-"): manifest for name, manifest in students.items()}
        return {"teacher": self.teacher, "latents": self.latents, "images": self.images, "selection": self.selection, "students": named}

    def unet(
        self,
        steps: int,
        *,
        change: float = 0.05,
        prediction_type: str | None = None,
        told: bool = False,
        stage: str | None = None,
        **more: Any,
    ) -> Any:
        """A student of `steps` steps: the teacher's UNet, every weight moved a little."""
        unet = copy.deepcopy(self.pipeline.unet)
        if told:
            add_guidance_input(unet)
        shake(list(unet.parameters()), change, seed=steps)
        settings = {"steps": (steps,), "timesteps": {steps: trailing_timesteps(steps)}, "method": "lightning-mse", "sampler": "trailing"}
        content = StudentUNet(
            prediction_type=prediction_type or self.teacher.content.prediction_type,
            teacher=self.teacher.identity,
            training_steps=30,
            **settings | {"guidance_scale": 1.0} | more,
        )
        with tempfile.TemporaryDirectory() as name:
            unet.save_pretrained(Path(name) / "unet", safe_serialization=True)
            _write_metrics(Path(name))
            stage = stage or ("lcm" if told else "lightning")
            return self._publish(Path(name), stage, f"lightning-8-{steps}" if stage == "lightning" else stage, content)

    def told(self, steps: int) -> Any:
        """An LCM of one step count whose UNet is told the guidance scale: 8.5, of 3 to 15."""
        facts = {"method": "lcm", "sampler": "lcm", "guidance_scale": 8.5, "guidance_range": (3, 15)}
        return self.unet(steps, told=True, timesteps={steps: lcm_timesteps(steps)}, **facts)

    def lora(self, rank: int = 2, alpha: float = 3.0) -> Any:
        """An LCM-LoRA for 4 and 2 steps, its weights random, alpha unlike its rank."""
        facts = {"method": "lcm", "steps": (4, 2), "timesteps": LCM_GRIDS, "sampler": "lcm"}
        return self._random_lora("lcm", "lcm", rank, alpha, seed=1, **facts)

    def lightning_lora(self, steps: int = 4, rank: int = 2, alpha: float = 3.0) -> Any:
        """A Lightning LoRA of one step count, its weights random."""
        facts = {"method": "lightning", "steps": (steps,), "timesteps": {steps: trailing_timesteps(steps)}, "sampler": "trailing"}
        return self._random_lora("lightning", f"lightning-{2 * steps}-{steps}-lora", rank, alpha, seed=5, **facts)

    def _random_lora(self, stage: str, node: str, rank: int, alpha: float, *, seed: int, **facts: Any) -> Any:
        unet = copy.deepcopy(self.pipeline.unet)
        add_lora(unet, rank, alpha, seed=seed)
        shake(lora_parameters(unet), 0.1, seed=seed + 1)
        content = StudentLoRA(
            prediction_type=self.teacher.content.prediction_type,
            guidance_scale=1.0,
            teacher=self.teacher.identity,
            training_steps=30,
            rank=rank,
            alpha=alpha,
            **facts,
        )
        with tempfile.TemporaryDirectory() as name:
            save_lora(unet, Path(name))
            _write_metrics(Path(name))
            return self._publish(Path(name), stage, node, content)

    def style(self, rank: int = 2, alpha: float = 1.5) -> Any:
        """A style LoRA with random weights."""
        unet = copy.deepcopy(self.pipeline.unet)
        add_lora(unet, rank, alpha, seed=3)
        shake(lora_parameters(unet), 0.1, seed=4)
        content = FinetunedLoRA(rank=rank, alpha=alpha, samples=3, training_steps=20, teacher=self.teacher.identity)
        with tempfile.TemporaryDirectory() as name:
            save_lora(unet, Path(name))
            _write_metrics(Path(name))
            return self._publish(Path(name), "finetune", "finetune-style", content)

    def finetuned_base(self, folder: Path) -> Any:
        """The pipeline in a folder as `finetune` publishes one."""
        return self._publish(folder, "finetune", "finetune-other", describe(folder))

    def _images(self) -> Any:
        random = np.random.default_rng(5)
        with tempfile.TemporaryDirectory() as name:
            writer = ShardWriter(Path(name), 4)
            for number, caption in enumerate(CAPTIONS):
                pixels = random.integers(0, 256, (20 + 4 * number, 32, 3), dtype=np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                data = buffer.getvalue()
                row = {"url": f"u{number}", "sha256": hashlib.sha256(data).hexdigest()}
                writer.add(Sample(f"{number:06d}", "png", data, caption, row))
            writer.close()
            content = ImageShards(rows_in_table=9, rows_dropped={"width or height": 1}, images=6, failures={"HTTP 404": 2}, shards=2)
            return self._publish(Path(name), "ingest", "ingest", content)

    def _selection(self) -> Any:
        rows = [
            {"key": f"{number:06d}", "caption": caption, "passed": True, "width": 32, "height": 20 + 4 * number}
            for number, caption in enumerate(CAPTIONS)
        ]
        with tempfile.TemporaryDirectory() as name:
            pq.write_table(pa.Table.from_pylist(rows), Path(name) / "verdicts.parquet")
            content = Selection(source=self.images.identity, images_in=6, images=5, dropped={"sharpness": 1})
            return self._publish(Path(name), "select", "select", content, {"measurements": "0" * 64})

    def _latents(self) -> Any:
        with tempfile.TemporaryDirectory() as name:
            pipeline = TeacherPipeline.load(self.store.fetch(self.teacher))
            content = write_latents(Path(name), pipeline, CAPTIONS, self.teacher.identity)
            return self._publish(Path(name), "encode", "encode", content)

    def _publish(self, folder: Path, stage: str, node: str, content: Any, inputs: dict[str, str] | None = None) -> Any:
        lineage = Lineage(stage=stage, node=node, revision=1, config={}, inputs=inputs or {})
        identity = digest([stage, node, content.model_dump(mode="json")])
        manifest: Manifest[Any] = self.store.publish(folder, identity=identity, content=content, lineage=lineage)
        return manifest


def controlnet_file(unet: Any, folder: Path, *, change: float = 0.05) -> Path:
    """A ControlNet of the UNet for pictures of twice its size, as diffusers makes one, every weight moved a little."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        controlnet: Any = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    shake(list(controlnet.parameters()) if change else [], change, seed=6)
    controlnet.save_pretrained(folder)
    return folder


def shake(parameters: list[torch.nn.Parameter], amount: float, seed: int) -> None:
    """Add noise of the standard deviation `amount`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))


def _write_metrics(folder: Path) -> None:
    steps = list(range(1, 31))
    pq.write_table(pa.table({"step": steps, "student.loss": [1 / step for step in steps]}), folder / "metrics.parquet")
