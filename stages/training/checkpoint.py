"""Checkpoints: every network, optimiser, average, the figures and the position, registered together and saved as one part of the artifact."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from infra.store import Part
from schemas.errors import RunFailed
from stages.training.method import Method
from stages.training.metrics import Row, read_metrics, write_metrics
from stages.training.optimization import Updater
from stages.training.sharding import fill_, gathered, local
from stages.workspace import Workspace

logger = logging.getLogger(__name__)

KEPT = 2
"""Checkpoints kept: the newest, and one before it."""


class Checkpoints:
    """The checkpoints of one run of the loop, on the store, as parts `<name>-00000500`."""

    def __init__(self, workspace: Workspace, name: str, method: Method[Any, Any], updaters: Mapping[str, Updater]) -> None:
        self.workspace, self.name, self.method, self.updaters = workspace, name, method, updaters
        self.newest: int | None = None
        """Step of the newest checkpoint; None before the first."""
        self.divided = any(updater.divided for updater in updaters.values())
        """Whether it takes all processes to save."""
        self.roll_backs = 0
        """How often training has been taken back to an earlier state."""
        self._names: list[str] = []
        self._check_nothing_is_forgotten()

    def save(self, step: int, rows: list[Row]) -> None:
        """Save the state after `step` completed steps, atomically, and delete all but the newest. Only the first of several processes writes.

        What is divided over processes is made whole to be saved, so any number of them can go on from it. Raises `RunFailed` for weights that are
        not finite.
        """
        part = f"{self.name}-{step:08d}"
        self.newest = step
        self.write(part, step, rows)
        if not self.workspace.parallel.leads:
            return
        self._names = [*(name for name in self._names if name != part), part]
        self.workspace.delete_parts(self._names[:-KEPT])
        self._names = self._names[-KEPT:]

    def restart(self, step: int, rows: list[Row]) -> None:
        """Save the state after `step` steps, to which training was taken back, and delete the checkpoints beyond it.

        Killed before the last of them is deleted, a run goes on from that one, meets the same alarm and comes here again.
        """
        self.save(step, rows)
        if self.workspace.parallel.leads:
            *beyond, newest = self._names
            self.workspace.delete_parts(beyond)
            self._names = [newest]

    def write(self, part: str, step: int, rows: list[Row]) -> None:
        """Save the state as a part of this name. Raises `RunFailed` for weights that are not finite."""
        leads = self.workspace.parallel.leads
        if not (leads or self.divided):
            return
        with self.workspace.folder("checkpoint") as folder:
            names = {}
            for piece, tensors in self._pieces().items():
                saved = {}
                for name, tensor in self._whole(tensors):
                    _refuse_non_finite(part, piece, name, tensor)
                    if leads:
                        saved[name] = tensor.detach().contiguous().cpu()
                names[piece] = sorted(saved)
                if leads:
                    save_file(saved, folder / f"{piece}.safetensors")
            if not leads:
                return
            updates = {player: updater.updates for player, updater in self.updaters.items()}
            state = {"step": step, "roll_backs": self.roll_backs, "updates": updates, "pieces": names}
            (folder / "state.json").write_text(json.dumps(state, indent=1))
            write_metrics(rows, folder / "metrics.parquet")
            self.workspace.save_part(part, folder, {"step": step, "roll_backs": self.roll_backs})

    def resume(self) -> tuple[int, list[Row]]:
        """Load the newest complete checkpoint: steps completed, and their figures. (0, []) where there is none.

        Raises `RunFailed` naming what is missing or unknown in it, before anything is changed.
        """
        self.workspace.parallel.wait()  # nobody writes any more, and all find the same
        parts = [part for part in self.workspace.parts() if part.name.rpartition("-")[0] == self.name]
        self._names = [part.name for part in parts]
        if not parts:
            return 0, []
        step, rows = self.read(parts[-1])
        self.newest = step
        logger.info("resumed from %s", parts[-1].name)
        return step, rows

    def read(self, part: Part) -> tuple[int, list[Row]]:
        """Load the state that `write` saved: its step and its figures. Raises `RunFailed`."""
        with self.workspace.folder("checkpoint") as folder:
            return self._load(part.name, self.workspace.load_part(part, folder / "part"))

    def _load(self, part: str, folder: Path) -> tuple[int, list[Row]]:
        state = json.loads((folder / "state.json").read_text())
        live = self._pieces()
        _refuse_difference(part, "piece", set(live), {path.stem for path in folder.glob("*.safetensors")} & set(state["pieces"]))
        _refuse_difference(part, "player", set(self.updaters), set(state["updates"]))
        saved = {piece: load_file(folder / f"{piece}.safetensors") for piece in live}
        for piece, loaded in saved.items():  # an optimiser has no tensors before its first step
            expected = state["pieces"][piece] if piece.startswith("optimizer-") else live[piece]
            _refuse_difference(part, f"tensor of {piece}", set(expected), set(loaded))
        for piece, tensors in live.items():
            if not piece.startswith("optimizer-"):
                for name, tensor in tensors.items():
                    fill_(tensor, saved[piece][name])
        for player, updater in self.updaters.items():
            updater.load_optimizer_state(saved[f"optimizer-{player}"])
            updater.updates = state["updates"][player]
        self.roll_backs = int(state["roll_backs"])
        return int(state["step"]), list(read_metrics(folder / "metrics.parquet"))

    def _whole(self, tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        """All tensors of a piece, one by one, as they would be in one process."""
        return gathered(tensors, self.workspace.parallel, self.workspace.device) if self.divided else tensors.items()

    def _pieces(self) -> dict[str, Mapping[str, Tensor]]:
        """Everything that a checkpoint holds, as live tensors. One place, so that saving and loading cannot differ."""
        pieces: dict[str, Mapping[str, Tensor]] = {f"network-{name}": tensors for name, tensors in self.method.state().items()}
        for player, updater in self.updaters.items():
            pieces[f"optimizer-{player}"] = updater.optimizer_state()
            if updater.average is not None:
                pieces[f"average-{player}"] = updater.average
        return pieces

    def _check_nothing_is_forgotten(self) -> None:
        """Every trained parameter must lie in a network that the method names."""
        saved = {local(tensor).data_ptr() for tensors in self.method.state().values() for tensor in tensors.values()}
        for player, updater in self.updaters.items():
            for name, parameter in updater.parameters.items():
                if local(parameter).data_ptr() not in saved:
                    raise ValueError(f"player {player}: the method's state() lacks the parameter {name}, so a checkpoint would lose it")


def _refuse_difference(part: str, what: str, expected: set[str], found: set[str]) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        said = "; ".join(f"{word} {what} {', '.join(names[:5])}" for word, names in (("missing", missing), ("unknown", extra)) if names)
        raise RunFailed(f"{part} does not fit this method and is refused: {said}; delete this stage's parts to train it from the start")


def _refuse_non_finite(part: str, piece: str, name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise RunFailed(f"{part} is not saved: {piece} holds a value that is not finite in {name}")
