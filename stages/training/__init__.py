"""The one training loop for every method: data order, noise, optimisers, precision, checkpoints, metrics."""

from stages.ranks import Parallel
from stages.training.figures import Figure, Share, Spread
from stages.training.loop import train
from stages.training.method import Method, Player, Turn
from stages.training.metrics import Row, write_metrics
from stages.training.randomness import Draw, generator

__all__ = [
    "Draw",
    "Figure",
    "Method",
    "Parallel",
    "Player",
    "Row",
    "Share",
    "Spread",
    "Turn",
    "generator",
    "train",
    "write_metrics",
]
