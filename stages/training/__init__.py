"""The one training loop for every method: data order, noise, optimisers, precision, checkpoints, metrics."""

from stages.ranks import Parallel
from stages.training.loop import train
from stages.training.method import Method, Player, Turn
from stages.training.metrics import Row, write_metrics
from stages.training.randomness import Draw, generator

__all__ = ["Draw", "Method", "Parallel", "Player", "Row", "Turn", "generator", "train", "write_metrics"]
