"""Copies the teacher's one file."""

import shutil
from pathlib import Path

from schemas.base import Model
from schemas.manifest import Manifest, Teacher
from schemas.teacher import TeacherConfig
from stages.workspace import Workspace
from tests.flows.toy import note_run


class Inputs(Model):
    pass


def run(config: TeacherConfig, inputs: Inputs, workspace: Workspace) -> Manifest[Teacher]:
    note_run("teacher")
    with workspace.folder("teacher") as folder:
        shutil.copy(Path(workspace.outside["source"]) / "weights.bin", folder)
        content = Teacher(architecture="Toy", prediction_type="epsilon", resolution=8, weights_digest="0" * 64, parameters={"unet": 1})
        return workspace.publish(folder, content)
