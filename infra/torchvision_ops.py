"""Make torchvision importable beside a CPU-only torch.

The torchvision wheel of PyPI is linked against CUDA. Beside a CPU build of torch its `_C` library cannot be loaded, the operators it would
define are missing, and `import torchvision` fails, and with it transformers and peft, which import it when it is installed. Declaring the
schemas of the two operators that torchvision registers fake kernels for is enough for all that we use of it (transforms and models in plain
torch).
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch

_kept: list[torch.library.Library] = []  # a Library that is collected takes its definitions with it


def define_missing_ops() -> None:
    """Declare `torchvision::nms` and `torchvision::qnms` where torchvision is installed but cannot load its own library."""
    if _kept or importlib.util.find_spec("torchvision") is None:
        return
    if _torchvision_loads():
        return
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)


def _torchvision_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations)))
    for library in sorted(folder.glob("_C*.so")) + sorted(folder.glob("_C*.pyd")):
        try:
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        except OSError:
            return False
    return hasattr(torch.ops.torchvision, "nms")
