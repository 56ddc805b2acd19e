"""`encode`: VAE latents and text embeddings of the selected images."""

from stages.encode.stage import Inputs, run

__all__ = ["Inputs", "run"]
