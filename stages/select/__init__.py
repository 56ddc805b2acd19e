"""`select`: images that pass resolution, aesthetics and sharpness."""

from stages.select.stage import Inputs, run

__all__ = ["Inputs", "run"]
