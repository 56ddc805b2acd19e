"""`dmd`: distribution matching distillation (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867)."""

from stages.dmd.stage import Inputs, preflight, run

__all__ = ["Inputs", "preflight", "run"]
