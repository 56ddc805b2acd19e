"""A batch size that is left to a device's memory: found once, and kept, so that who goes on elsewhere in memory makes the same bits."""

from collections.abc import Callable
from typing import Final

from stages.workspace import Workspace

_FOUND: Final = "batch-size"
"""The part that keeps what the trial found."""


def fitted_once(workspace: Workspace, unit: str, trial: Callable[[], int]) -> int:
    """What `trial` finds, or found in an earlier run of the same stage. `unit` names what is counted, such as `pictures`."""
    found = next((part.note[unit] for part in workspace.parts() if part.name == _FOUND), None)
    if not isinstance(found, int):
        found = trial()
        with workspace.folder("nothing") as folder:
            workspace.save_part(_FOUND, folder, {unit: found})
    return found
