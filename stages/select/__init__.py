"""`select`: images that pass resolution, aesthetics and sharpness."""

from stages.select.stage import Inputs, preflight, run

__all__ = ["Inputs", "preflight", "run"]
