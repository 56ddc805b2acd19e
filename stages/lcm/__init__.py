"""`lcm`: latent consistency distillation of a UNet or a LoRA (LCM, arXiv 2310.04378; LCM-LoRA, arXiv 2311.05556)."""

from stages.lcm.stage import Inputs, preflight, run

__all__ = ["Inputs", "preflight", "run"]
