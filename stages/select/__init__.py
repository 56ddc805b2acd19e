"""`select`: images that pass resolution, aesthetics and sharpness, judged by their measurements alone."""

from stages.select.stage import Inputs, run

__all__ = ["Inputs", "run"]
