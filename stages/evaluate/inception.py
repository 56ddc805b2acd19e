"""Inception as clean-fid defines it: the TorchScript file of StyleGAN's authors, from a place that the recipe names or clean-fid's own download.

TorchScript is code as well as weights, and this is the one place that reads any: the network's definition is in the file and nowhere else, and the
published FIDs are of it. A file that the recipe names is as trusted as the recipe.
"""

import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import torch

from infra.hub import first_line
from schemas.errors import BadInput
from stages.evaluate.feature_network import INCEPTION_PX, FeatureNetwork

INCEPTION_FILE: Final = "inception-2015-12-05.pt"
_FEATURES: Final = 2048


def load_inception(device: str, weights: Path | None, field: str) -> FeatureNetwork:
    """Load it. `weights` is the file, or a folder with it; None: clean-fid downloads it, into the system's folder for temporary files.

    Raises `BadInput`, naming the recipe's `field`, where the file cannot be had or is another network's.
    """
    from cleanfid.inception_torchscript import InceptionV3W  # noqa: PLC0415  # an optional extra

    # the folder of clean-fid's own `feature_extractor`
    folder = Path("." if platform.system() == "Windows" else "/tmp") if weights is None else _folder(weights, field)
    try:
        network = InceptionV3W(str(folder), download=weights is None).to(torch.device(device)).eval()
        with torch.inference_mode():
            shape = network(torch.zeros(1, 3, INCEPTION_PX, INCEPTION_PX, device=device)).shape
    except (OSError, RuntimeError, AttributeError) as error:
        what = f"clean-fid could not download {INCEPTION_FILE}" if weights is None else f"{weights}: is not clean-fid's network"
        raise BadInput(f"{field}: {what} ({first_line(error)}); expected the file {INCEPTION_FILE}, or another extractor") from error
    if shape != (1, _FEATURES):
        raise BadInput(f"{field}: {weights}: gives features of shape {tuple(shape)}; expected {(1, _FEATURES)} of {INCEPTION_FILE}")
    return FeatureNetwork(network, "Inception v3 (clean-fid)")


def is_inception(path: str) -> bool:
    """Whether a file of a folder is it."""
    return path == INCEPTION_FILE


def check_inception(names: Iterable[str], where: str) -> None:
    """Raise `BadInput` unless it is among files of these names; `where` is the recipe's field with their place."""
    if INCEPTION_FILE not in names:
        raise BadInput(f"{where}: is neither the file {INCEPTION_FILE} nor a folder with it; expected one of them")


def _folder(weights: Path, field: str) -> Path:
    folder = weights if weights.is_dir() else weights.parent
    check_inception([path.name for path in folder.glob("*")] if weights.is_dir() else [weights.name], f"{field}: {weights}")
    return folder
