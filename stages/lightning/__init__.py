"""`lightning`: one link of progressive adversarial distillation (SDXL-Lightning, arXiv 2402.13929)."""

from stages.lightning.stage import Inputs, preflight, run

__all__ = ["Inputs", "preflight", "run"]
