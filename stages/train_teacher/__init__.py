"""`train-teacher`: a small SDXL-type pipeline from scratch, for the tiny recipe, tests and studies of distillation itself."""

from stages.train_teacher.stage import Inputs, run

__all__ = ["Inputs", "run"]
