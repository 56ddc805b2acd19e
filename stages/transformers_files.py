"""What the folder of a model in transformers' layout must hold, told by the names of its files: weights as safetensors only."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from typing import Final

from schemas.errors import BadInput

_WEIGHTS: Final = ("model.safetensors", "model.safetensors.index.json")
_OPEN_CLIP: Final = "open_clip_*"
_PICKLED: Final = "pytorch_model*.bin"


def is_model_file(path: str) -> bool:
    """Whether a file is needed, by its path relative to the folder: subfolders, and weights of other names, hold other formats of the same."""
    return "/" not in path and (path.endswith((".json", ".txt")) or fnmatch(path, "model*.safetensors"))


def check_model_files(names: Iterable[str], others: Sequence[str], where: str, what: str) -> None:
    """Raise `BadInput` unless a folder's files, by `names`, are those of a model, and of everything else that is asked for (`others`, patterns).

    `where` is the recipe's field with the folder, `what` the model that is expected there.
    """
    found = set(names)
    missing = [pattern for pattern in ("config.json", *others) if not any(fnmatch(name, pattern) for name in found)]
    missing += [] if found & set(_WEIGHTS) else [_WEIGHTS[0]]
    if not missing:
        return
    instead = ""
    if any(fnmatch(name, _OPEN_CLIP) for name in found):
        instead = ", and holds OpenCLIP's own layout"
    elif any(fnmatch(name, _PICKLED) for name in found):
        instead = ", and holds pickled weights, which are not read"
    raise BadInput(f"{where}: lacks {', '.join(missing)}{instead}; expected {what} in transformers' layout, with safetensors")
