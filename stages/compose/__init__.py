"""An acceleration LoRA and styles on any base of its architecture, without training (LCM-LoRA, arXiv 2311.05556, 3.3)."""

from infra.torchvision_ops import define_missing_ops

define_missing_ops()

from stages.compose.sources import Ask  # noqa: E402
from stages.compose.write import compose  # noqa: E402

__all__ = ["Ask", "compose"]
