"""Weights files of a component: found (safetensors only, whole or sharded), checked and counted by their headers alone."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from schemas.errors import BadInput

STEMS = ("diffusion_pytorch_model", "model")
"""Names of weights files: diffusers' and transformers'."""

_MAX_HEADER = 100 * 2**20


@dataclass(frozen=True)
class WeightsFiles:
    """The weights of one component."""

    files: tuple[Path, ...]
    """Safetensors files, sorted: one, or the shards."""
    index: Path | None = None
    """The file that says which shard holds which tensor."""
    variant: str | None = None

    def plain_name(self, path: Path) -> str:
        """File name without the variant, as a pipeline loaded without `variant=` expects it."""
        return path.name if self.variant is None else path.name.replace(f".{self.variant}", "", 1)


def find_weights(folder: Path, variant: str | None = None) -> WeightsFiles:
    """Find a component's safetensors weights of the variant (such as `fp16`; None: the plain ones), and check that they are complete.

    Raises `BadInput` when there are none, when only pickled weights are there, when shards are missing, and when a file is cut short.
    """
    for stem in STEMS:
        whole = folder / (f"{stem}.safetensors" if variant is None else f"{stem}.{variant}.safetensors")
        index = folder / (f"{stem}.safetensors.index.json" if variant is None else f"{stem}.safetensors.index.{variant}.json")
        if whole.is_file():
            found = WeightsFiles((whole,), variant=variant)
        elif index.is_file():
            found = WeightsFiles(_shards(index), index, variant)
        else:
            continue
        for path in found.files:
            read_header(path)
        return found
    what = "" if variant is None else f" of variant {variant!r}"
    others = sorted(
        path.name for pattern in ("*.bin", "*.ckpt", "*.pt", "*.msgpack", "*.onnx", "*.safetensors") for path in folder.glob(pattern)
    )
    found_text = f"found {', '.join(others)}" if others else "found no weights"
    raise BadInput(f"{folder}: no safetensors weights{what}; {found_text}; expected {' or '.join(f'{stem}.safetensors' for stem in STEMS)}")


def read_header(path: Path) -> dict[str, Any]:
    """Header of a safetensors file by tensor name (dtype, shape, data_offsets); the file's size is checked against it.

    Raises `BadInput` for a file that is missing, cut short, longer than its header says, or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise BadInput(f"{path}: not a complete safetensors file ({size} bytes)")
            header = json.loads(stream.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"{path}: not a safetensors file ({error})") from error
    if size != 8 + length + end:
        what = "cut short" if size < 8 + length + end else "too long"
        raise BadInput(f"{path}: {what}: {size} bytes, its header promises {8 + length + end}")
    header.pop("__metadata__", None)
    return dict(header)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes depend on the arguments alone: the library writes metadata of several keys in a random order."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata=dict(metadata))
    with path.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(ordered) == length, "the same entries in another order"
        stream.seek(8)
        stream.write(ordered)


def parameter_count(weights: WeightsFiles) -> int:
    """Number of floating-point values in the files (integer tensors, such as position ids, are no parameters)."""
    entries = (entry for path in weights.files for entry in read_header(path).values())
    return sum(math.prod(entry["shape"]) for entry in entries if entry["dtype"].startswith(("F", "BF")))


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        weight_map: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadInput(f"{index}: not an index of weights shards ({error!r})") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise BadInput(f"{index.parent}: shards {', '.join(missing) or '(none)'} are missing; expected all that {index.name} lists")
    return tuple(index.parent / name for name in names)
