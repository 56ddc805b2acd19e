"""Checkpoints: every network, optimiser, average, the figures and the position, registered together and saved as one part of the artifact."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from schemas.errors import RunFailed
from stages.training.method import Method
from stages.training.metrics import Row, read_metrics, write_metrics
from stages.training.optimization import Updater
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
        self._names: list[str] = []
        self._check_nothing_is_forgotten()

    def save(self, step: int, rows: list[Row]) -> None:
        """Save the state after `step` completed steps, atomically, and delete all but the newest. Only the first of several processes writes.

        Raises `RunFailed` for weights that are not finite.
        """
        part = f"{self.name}-{step:08d}"
        self.newest = step
        if not self.workspace.parallel.leads:
            return
        with self.workspace.folder("checkpoint") as folder:
            names = {}
            for piece, tensors in self._pieces().items():
                names[piece] = sorted(tensors)
                _refuse_non_finite(part, piece, tensors)
                save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / f"{piece}.safetensors")
            updates = {player: updater.updates for player, updater in self.updaters.items()}
            (folder / "state.json").write_text(json.dumps({"step": step, "updates": updates, "pieces": names}, indent=1))
            write_metrics(rows, folder / "metrics.parquet")
            self.workspace.save_part(part, folder, {"step": step})
        self._names = [*(name for name in self._names if name != part), part]
        self.workspace.delete_parts(self._names[:-KEPT])
        self._names = self._names[-KEPT:]

    def resume(self) -> tuple[int, list[Row]]:
        """Load the newest complete checkpoint: steps completed, and their figures. (0, []) where there is none.

        Raises `RunFailed` naming what is missing or unknown in it, before anything is changed.
        """
        self.workspace.parallel.wait()  # nobody writes any more, and all find the same
        parts = [part for part in self.workspace.parts() if part.name.rpartition("-")[0] == self.name]
        self._names = [part.name for part in parts]
        if not parts:
            return 0, []
        with self.workspace.folder("checkpoint") as folder:
            step, rows = self._load(parts[-1].name, self.workspace.load_part(parts[-1], folder / "part"))
        self.newest = step
        logger.info("resumed from %s", parts[-1].name)
        return step, rows

    def _load(self, part: str, folder: Path) -> tuple[int, list[Row]]:
        state = json.loads((folder / "state.json").read_text())
        live = self._pieces()
        _refuse_difference(part, "piece", set(live), {path.stem for path in folder.glob("*.safetensors")} & set(state["pieces"]))
        _refuse_difference(part, "player", set(self.updaters), set(state["updates"]))
        saved = {piece: load_file(folder / f"{piece}.safetensors") for piece in live}
        for piece, loaded in saved.items():  # an optimiser has no tensors before its first step
            expected = state["pieces"][piece] if piece.startswith("optimizer-") else live[piece]
            _refuse_difference(part, f"tensor of {piece}", set(expected), set(loaded))
        with torch.no_grad():
            for piece, tensors in live.items():
                if not piece.startswith("optimizer-"):
                    for name, tensor in tensors.items():
                        tensor.copy_(saved[piece][name])
        for player, updater in self.updaters.items():
            updater.load_optimizer_state(saved[f"optimizer-{player}"])
            updater.updates = state["updates"][player]
        return int(state["step"]), list(read_metrics(folder / "metrics.parquet"))

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
        saved = {tensor.data_ptr() for tensors in self.method.state().values() for tensor in tensors.values()}
        for player, updater in self.updaters.items():
            for name, parameter in updater.parameters.items():
                if parameter.data_ptr() not in saved:
                    raise ValueError(f"player {player}: the method's state() lacks the parameter {name}, so a checkpoint would lose it")


def _refuse_difference(part: str, what: str, expected: set[str], found: set[str]) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        said = "; ".join(f"{word} {what} {', '.join(names[:5])}" for word, names in (("missing", missing), ("unknown", extra)) if names)
        raise RunFailed(f"{part} does not fit this method and is refused: {said}; delete this stage's parts to train it from the start")


def _refuse_non_finite(part: str, piece: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise RunFailed(f"{part} is not saved: {piece} holds a value that is not finite in {name}")
