"""Long: a number of steps, a checkpoint when it is stopped, and a result that does not tell how often it was."""

import os
import time
from pathlib import Path

from schemas.base import Model
from schemas.data import EncodeConfig
from schemas.manifest import ImageShards, Latents, Manifest, Selection, Teacher
from stages.workspace import Workspace
from tests.flows.toy import folder as toy_folder
from tests.flows.toy import note_run

STEPS = 20


class Inputs(Model):
    images: Manifest[ImageShards]
    selection: Manifest[Selection]
    teacher: Manifest[Teacher]


def _step_seconds() -> float:
    told = toy_folder() / "encode.seconds"
    return float(told.read_text() if told.exists() else os.environ.get("TOY_SECONDS", "0"))


def run(config: EncodeConfig, inputs: Inputs, workspace: Workspace) -> Manifest[Latents]:
    note_run("encode")
    step = max((int(part.name.rpartition("-")[2]) for part in workspace.parts()), default=0)
    (toy_folder() / "encode.start").write_text(str(step))
    try:
        while step < STEPS:
            time.sleep(_step_seconds())
            step += 1
            workspace.progress.update(step, STEPS, "steps", {"loss": 1 / step})
            (toy_folder() / "encode.step").write_text(str(step))
    except BaseException:
        with workspace.folder("checkpoint") as folder:
            (folder / "step.txt").write_text(str(step))
            workspace.save_part(f"checkpoint-{step:08d}", folder)
        raise
    rows = (workspace.fetch(inputs.selection) / "rows.txt").read_text()
    weights = (workspace.fetch(inputs.teacher) / "weights.bin").read_bytes()
    with workspace.folder("latents") as folder:
        (folder / "latents.txt").write_text(f"{rows}\n{weights.hex()}\n{STEPS} steps in batches of {config.batch_size}")
        shape = (4, 1, 1)
        content = Latents(samples=1, shards=1, latent_shape=shape, text_tokens=1, text_features=1, teacher=inputs.teacher.identity)
        return workspace.publish(Path(folder), content)
