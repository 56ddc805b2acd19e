"""`pairs`: noise and what the deterministic teacher makes of it."""

from stages.pairs.pair_set import PairSet
from stages.pairs.stage import Inputs, preflight, run, run_share

__all__ = ["Inputs", "PairSet", "preflight", "run", "run_share"]
