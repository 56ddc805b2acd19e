"""The student that a training goes on from, as it lies outside the store."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from infra.outside import local_copy, on_this_machine
from schemas.dmd import DmdConfig
from schemas.errors import BadInput
from schemas.lcm import LcmConfig
from stages.diffusion.facts import read_config
from stages.diffusion.lora import LORA_FILE, rank_and_alpha
from stages.students import UNET_FOLDER
from stages.workspace import Workspace

_OF_ARCHITECTURE: Final = ("in_channels", "block_out_channels", "cross_attention_dim", "addition_embed_type")
"""Fields of a UNet's configuration in which a student is its teacher's."""

Started = LcmConfig | DmdConfig
"""Sections with a `start`."""


def fetch_start(config: Started, teacher: Path, workspace: Workspace) -> Path | None:
    """Return the folder of the student to go on from, held against the teacher's (a pipeline folder); None where it starts as the teacher.

    Raises `BadInput` as `check_start` does, and for a UNet of another architecture.
    """
    if "start" not in workspace.outside:
        return None
    folder = local_copy(workspace.outside["start"], workspace.scratch, lambda path: path == LORA_FILE or path.startswith(f"{UNET_FOLDER}/"))
    check_start(config, folder)
    if config.network == "unet":
        with _said_of_the_start(config):
            _check_architecture(read_config(folder, UNET_FOLDER), read_config(teacher, "unet"))
    return folder


def preflight_start(config: Started, outside: Mapping[str, str]) -> None:
    """`check_start` of a student that lies on this machine; one elsewhere is looked at when it comes."""
    if "start" in outside and (folder := on_this_machine(outside["start"])) is not None:
        check_start(config, folder)


def check_start(config: Started, folder: Path) -> None:
    """Raise `BadInput` unless a student that the recipe can go on from lies in `folder`."""
    with _said_of_the_start(config):
        if config.network == "lora":
            found = rank_and_alpha(folder)
            if found != (config.lora_rank, config.lora_alpha):
                expected = f"lora_rank {config.lora_rank} and lora_alpha {config.lora_alpha:g}, as the recipe has them"
                raise BadInput(f"{folder}: a LoRA of rank {found[0]} and alpha {found[1]:g}; expected {expected}")
        elif read_config(folder, UNET_FOLDER).get("time_cond_proj_dim") is not None:
            if isinstance(config, DmdConfig):
                raise BadInput(f"{folder}: its UNet takes w as an input; expected one that does not")
            if config.guidance_w_range is None:
                raise BadInput(f"{folder}: its UNet takes w as an input; expected lcm.guidance_w_range too")


def _check_architecture(found: Mapping[str, Any], teacher: Mapping[str, Any]) -> None:
    for name in _OF_ARCHITECTURE:
        if found.get(name) != teacher.get(name):
            raise BadInput(f"its UNet has {name} {found.get(name)!r}; expected the teacher's, {teacher.get(name)!r}")


@contextmanager
def _said_of_the_start(config: Started) -> Iterator[None]:
    """Put the recipe's field before what is wrong with the student it names."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{'dmd' if isinstance(config, DmdConfig) else 'lcm'}.start: {error}") from error
