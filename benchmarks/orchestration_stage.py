"""A training stage that trains nothing, in the place of `finetune`: what remains of its time is orchestration."""

from dataclasses import replace

from schemas.base import Model
from schemas.finetune import FinetuneConfig
from schemas.manifest import FinetunedLoRA, Latents, Manifest, Teacher
from stages.registry import STAGES
from stages.workspace import Workspace
from tests.flows import toy


class Inputs(Model):
    """As the stage's own."""

    teacher: Manifest[Teacher]
    latents: Manifest[Latents]


def run(config: FinetuneConfig, inputs: Inputs, workspace: Workspace) -> Manifest[FinetunedLoRA]:
    """Publish one small file."""
    with workspace.folder("weights") as folder:
        (folder / "weights.txt").write_text(str(config.lora_rank))
        content = FinetunedLoRA(
            rank=config.lora_rank, alpha=config.lora_alpha, samples=1, training_steps=config.training_steps, teacher=inputs.teacher.identity
        )
        return workspace.publish(folder, content)


def install() -> None:
    """Put it and the tests' toys in the registry of this process."""
    toy.install()
    STAGES["finetune"] = replace(STAGES["finetune"], module=__name__)
