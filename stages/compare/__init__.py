"""Evaluated runs side by side: figures, differences, and what keeps them from being compared."""

from stages.compare.comparison import Comparison, Evaluated, compare, read_report

__all__ = ["Comparison", "Evaluated", "compare", "read_report"]
