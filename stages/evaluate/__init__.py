"""Teacher and students on the same prompts and noise: samples, metrics, a grid picture, a report."""

from infra.torchvision_ops import define_missing_ops

define_missing_ops()

from stages.evaluate.inputs import Inputs  # noqa: E402
from stages.evaluate.stage import preflight, run  # noqa: E402

__all__ = ["Inputs", "preflight", "run"]
