"""A folder that plain diffusers calls load: UNets, LoRAs, their schedulers, the teacher's pipeline, and a model card."""

from infra.torchvision_ops import define_missing_ops

define_missing_ops()

from stages.publish.export import export_folder  # noqa: E402
from stages.publish.stage import Inputs, preflight, run  # noqa: E402

__all__ = ["Inputs", "export_folder", "preflight", "run"]
