"""Students of the real stage, loaded by the code of SDXL-Lightning's public model card as it stands there, draw what is measured, bit for bit."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from schemas.evaluation import EvaluateConfig
from schemas.lightning import LightningConfig
from schemas.manifest import Manifest, Teacher
from stages import lightning
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.sampling import image_generator
from stages.evaluate.prompts import PromptSet
from stages.evaluate.rows import rows_of
from stages.evaluate.samples import Sampler
from stages.students import load_student
from tests.tiny_pipelines import Kind
from tests.training import artifacts

UNET = """
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel, EulerDiscreteScheduler
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

base = "stabilityai/stable-diffusion-xl-base-1.0"
repo = "ByteDance/SDXL-Lightning"
ckpt = "sdxl_lightning_4step_unet.safetensors" # Use the correct ckpt for your step setting!

# Load model.
unet = UNet2DConditionModel.from_config(base, subfolder="unet").to("cuda", torch.float16)
unet.load_state_dict(load_file(hf_hub_download(repo, ckpt), device="cuda"))
pipe = StableDiffusionXLPipeline.from_pretrained(base, unet=unet, torch_dtype=torch.float16, variant="fp16").to("cuda")

# Ensure sampler uses "trailing" timesteps.
pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")

# Ensure using the same inference steps as the loaded model and CFG set to 0.
pipe("A girl smiling", num_inference_steps=4, guidance_scale=0).images[0].save("output.png")
"""
LORA = """
import torch
from diffusers import StableDiffusionXLPipeline, EulerDiscreteScheduler
from huggingface_hub import hf_hub_download

base = "stabilityai/stable-diffusion-xl-base-1.0"
repo = "ByteDance/SDXL-Lightning"
ckpt = "sdxl_lightning_4step_lora.safetensors" # Use the correct ckpt for your step setting!

# Load model.
pipe = StableDiffusionXLPipeline.from_pretrained(base, torch_dtype=torch.float16, variant="fp16").to("cuda")
pipe.load_lora_weights(hf_hub_download(repo, ckpt))
pipe.fuse_lora()

# Ensure sampler uses "trailing" timesteps.
pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")

# Ensure using the same inference steps as the loaded model and CFG set to 0.
pipe("A girl smiling", num_inference_steps=4, guidance_scale=0).images[0].save("output.png")
"""
ONE_STEP = UNET.replace("4step_unet", "1step_unet_x0").replace(
    'timestep_spacing="trailing")', 'timestep_spacing="trailing", prediction_type="sample")'
).replace("num_inference_steps=4", "num_inference_steps=1")  # fmt: skip
UNFUSED = LORA.replace("pipe.fuse_lora()\n", "")
PROMPT = "A girl smiling"
SEED = 11
pytestmark = pytest.mark.slow
CHAIN = LightningConfig.model_validate(
    {
        "chain": [8, 4, 2, 1],
        "training_steps": 3,
        "batch_size": 2,
        "lora_rank": 4,
        "lora_alpha": 8,
        "optimizer": {"learning_rate": 2e-2},
        "adversarial": {"lora_learning_rate": 2e-2, "unet_learning_rate": 2e-3, "conversion_steps": 2},
    }
)


@dataclass(frozen=True)
class Made:
    """A chain that the stage has trained: much changed by few steps."""

    folder: Path
    teacher: Manifest[Teacher]
    students: Mapping[str, Manifest[Any]]
    """By the run's name."""

    def file(self, name: str) -> Path:
        """The one file of a student's weights."""
        manifest = self.students[name]
        (path,) = [entry.path for entry in manifest.files if entry.path.endswith(".safetensors")]
        return artifacts.open_store(self.folder).fetch(manifest) / path

    def measured(self, name: str, *, merged: bool = False, trained: bool = True) -> np.ndarray:
        """The picture (H, W, 3) that the evaluation makes of the prompt with a student, or at its step count with the teacher."""
        store = artifacts.open_store(self.folder)
        pipeline = TeacherPipeline.load(store.fetch(self.teacher))
        student = self.students[name]
        (row,) = rows_of(EvaluateConfig(teacher_steps=()), self.teacher.content, {name: student})
        sampler = Sampler(pipeline, PromptSet((PROMPT,), 1, "file"), seed=SEED, batch_size=1, tick=lambda _images: None)
        denoiser = load_student(pipeline, student, store.fetch(student), merged=merged) if trained else pipeline.denoiser()
        return sampler.batch(row, denoiser, 0)[0]


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    kind: Kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    teacher = artifacts.make_teacher(folder, kind)
    latents = artifacts.make_latents(folder, teacher)
    students: dict[str, Manifest[Any]] = {}
    for run in CHAIN.runs():
        inputs = lightning.Inputs(
            teacher=teacher, latents=latents, source=students.get(run.teacher or ""), start=students.get(run.start or "")
        )
        students[run.name] = lightning.run(run.config, inputs, artifacts.workspace(folder, config=run.config))
    return Made(folder, teacher, students)


def drawn(code: str, made: Made, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """What a snippet of the public card saves. Nothing in it is changed but the places, the device and the type, and the steps."""
    import huggingface_hub

    store = artifacts.open_store(made.folder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _repo, _file: str(made.file(name)))
    monkeypatch.chdir(folder)
    changes = {
        "stabilityai/stable-diffusion-xl-base-1.0": str(store.fetch(made.teacher)),
        "StableDiffusionXLPipeline": made.teacher.content.architecture,
        '"cuda"': '"cpu"',
        "torch.float16": "torch.float32",
        ', variant="fp16"': "",
        "num_inference_steps=4": f"num_inference_steps={made.students[name].content.steps[0]}",
    }
    for old, new in changes.items():
        code = code.replace(old, new)
    load, call, draw = code.partition("\npipe(")
    names: dict[str, Any] = {}
    exec(compile(load, name, "exec"), names)
    names["pipe"].set_progress_bar_config(disable=True)
    with torch.random.fork_rng(devices=[]):  # the card's call draws its noise from the global generator
        torch.set_rng_state(image_generator(SEED, 0).get_state())
        exec(compile(call + draw, name, "exec"), names)
    return np.asarray(Image.open(folder / "output.png"))


@pytest.mark.parametrize(
    ("code", "name", "merged"),
    [
        (UNET, "lightning-8-4-unet", False),
        (LORA, "lightning-4-2-lora", True),
        (UNFUSED, "lightning-4-2-lora", False),
        (UNET, "lightning-4-2-unet", False),
        (ONE_STEP, "lightning-2-1-unet", False),
    ],
    ids=["4-step unet", "2-step lora", "2-step lora unfused", "2-step unet", "1-step unet"],
)
def test_the_public_cards_code_draws_what_is_measured(
    *, code: str, name: str, merged: bool, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = made.measured(name, merged=merged)
    assert np.array_equal(drawn(code, made, name, tmp_path, monkeypatch), ours)
    assert not np.array_equal(ours, made.measured(name, trained=False)), "the student is the teacher"


def test_fusing_changes_no_more_than_the_last_bits(made: Made) -> None:
    unfused, fused = (made.measured("lightning-4-2-lora", merged=merged).astype(int) for merged in (False, True))
    assert np.abs(unfused - fused).max() <= 1
