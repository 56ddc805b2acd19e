"""`measure`: what is told of every picture once, so that thresholds can change without reading one again."""

from stages.measure.stage import Inputs, preflight, run

__all__ = ["Inputs", "preflight", "run"]
