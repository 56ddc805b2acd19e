"""The peer of `benchmarks.lcm_race`: diffusers' own training script for LCM-LoRA of SDXL, run unchanged on our data, and its LoRA as one of ours.

`python -m benchmarks.lcm_race_peer SCRIPT ARGUMENTS...` runs the script as `python SCRIPT ARGUMENTS...` would, but where torchvision cannot load its
own library beside a CPU-only torch (`infra.torchvision_ops`).
"""

import importlib.util
import json
import runpy
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final

from safetensors.torch import load_file

from infra.torchvision_ops import define_missing_ops
from schemas.errors import BadInput
from schemas.lcm import LcmConfig
from stages.diffusion.lora import LORA_FILE, add_lora, load_lora_state, save_lora
from stages.diffusion.pipeline import load_unet
from stages.selected import SelectedPictures

from diffusers.utils import convert_unet_state_dict_to_peft  # isort: skip - after what defines torchvision's operations

PLACE: Final = "examples/consistency_distillation/train_lcm_distill_lora_sdxl.py"
PACKAGES: Final = ("accelerate", "datasets", "torchvision", "tensorboard")
"""What the script imports beside our own dependencies."""


def check_script(script: Path) -> None:
    """Raises `BadInput` saying where the script is to be had, and which of its packages are missing."""
    expected = f"expected {PLACE} of the repository huggingface/diffusers, at the tag v{version('diffusers')} or the newest before it"
    if not script.is_file():
        raise BadInput(f"--script {script}: no such file; {expected}")
    if "--pretrained_teacher_model" not in script.read_text(encoding="utf-8"):
        raise BadInput(f"--script {script}: another script; {expected}")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(f"--script {script}: imports {', '.join(missing)}; expected in this environment: pip install {' '.join(missing)}")


def write_pictures(pictures: SelectedPictures, folder: Path) -> None:
    """Write the pictures that we train on as the folder that `datasets` reads: files and `metadata.jsonl` with their captions."""
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as table:
        for sample in pictures:
            name = f"{sample.key}.{sample.extension}"
            (folder / name).write_bytes(sample.image)
            table.write(json.dumps({"file_name": name, "text": sample.caption}) + "\n")


def command(script: Path, teacher: Path, pictures: Path, output: Path, *, config: LcmConfig, resolution_px: int, seed: int) -> list[str]:
    """The command line that trains as `config` says, but for what the script has no word for.

    Its cosine begins its warm-up at 0 and ours a step later, its guidance scale is an interval, which is here one point, in LCM's convention
    whatever its help says, and it draws latents from the VAE's posterior in every step where we encode the posterior's mean once.
    """
    optimizer = config.optimizer
    settings = {
        "pretrained_teacher_model": teacher,
        "train_data_dir": pictures,
        "output_dir": output,
        "cache_dir": output / "cache",
        "resolution": resolution_px,
        "interpolation_type": "lanczos",
        "train_batch_size": config.batch_size,
        "max_train_steps": config.training_steps,
        "checkpointing_steps": config.checkpoint_every,
        "validation_steps": 10**9,
        "learning_rate": optimizer.learning_rate,
        "adam_weight_decay": optimizer.weight_decay,
        "lr_scheduler": config.lr_schedule,
        "lr_warmup_steps": config.warmup_steps,
        "max_grad_norm": config.max_grad_norm,
        "w_min": config.guidance_w,
        "w_max": config.guidance_w,
        "num_ddim_timesteps": config.ddim_timesteps,
        "timestep_scaling_factor": config.timestep_scaling,
        "loss_type": config.loss,
        "huber_c": config.huber_c,
        "lora_rank": config.lora_rank,
        "lora_alpha": int(config.lora_alpha),
        "mixed_precision": "no",
        "seed": seed,
    }
    given = [f"--{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "benchmarks.lcm_race_peer", str(script), "--center_crop", *given]


def samples_seen(steps: int, batch_size: int, pictures: int) -> int:
    """Samples of the script's first `steps` steps: the last batch of an epoch is the rest of the set."""
    batches = -(-pictures // batch_size)
    epochs, left = divmod(steps, batches)
    return epochs * pictures + min(left * batch_size, pictures)


def convert(output: Path, teacher: Path, target: Path, *, rank: int, alpha: float) -> None:
    """Write the LoRA that the script left in `output` as our stages write theirs."""
    unet = load_unet(teacher)
    tensors = {name.removeprefix("unet."): tensor for name, tensor in load_file(output / LORA_FILE).items()}
    add_lora(unet, rank, alpha, seed=0)
    load_lora_state(unet, convert_unet_state_dict_to_peft(tensors))
    save_lora(unet, target)


def launch(arguments: Sequence[str]) -> None:
    """Run a script as the main program."""
    define_missing_ops()
    sys.argv = list(arguments)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    launch(sys.argv[1:])
