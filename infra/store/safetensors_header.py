"""Read single tensors and the header of a safetensors file without its other bytes.

Format: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}, "__metadata__": {...}}`, then the data.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the format's own readers."""
FIRST_READ = 64 * 1024
NUMPY_TYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
}

ReadRange = Callable[[int, int], bytes]
"""`(start, stop)` to the bytes of that range, fewer where the file ends before."""


@dataclass(frozen=True)
class RawTensor:
    """A tensor's bytes as they lie in the file (little-endian, row-major), with the dtype's name in safetensors (`F32`, `BF16`, ...)."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def numpy(self) -> "np.ndarray[Any, Any]":
        """Return a read-only view of the bytes. Raises `TypeError` for dtypes that numpy lacks, such as BF16."""
        if self.dtype not in NUMPY_TYPES:
            raise TypeError(f"numpy has no dtype for {self.dtype}: use the raw bytes")
        return np.frombuffer(self.data, NUMPY_TYPES[self.dtype]).reshape(self.shape)


@dataclass(frozen=True)
class Header:
    """The JSON header, and the position of the data in the file (bytes)."""

    tensors: dict[str, Any]
    data_start: int

    def span(self, name: str) -> tuple[int, int]:
        """Return `(start, stop)` of a tensor's bytes in the file. Raises `ValueError` when it is not there or its entry makes no sense."""
        entry = self.tensors.get(name)
        if name == "__metadata__" or not isinstance(entry, dict):
            raise ValueError(f"no tensor named {name!r}")
        start, stop = entry["data_offsets"]
        if not 0 <= start <= stop:
            raise ValueError(f"tensor {name!r} has impossible offsets {start}..{stop}")
        return self.data_start + start, self.data_start + stop


def read_header(read: ReadRange) -> Header:
    """Read and parse the header. Raises `ValueError` saying why the bytes are not a safetensors file."""
    head = read(0, FIRST_READ)
    if len(head) < 8:
        raise ValueError(f"a safetensors file has at least 8 bytes, found {len(head)}")
    length = int.from_bytes(head[:8], "little")
    if length > LONGEST_HEADER:
        raise ValueError(f"a header of {length} bytes is announced: not a safetensors file")
    if len(head) < 8 + length:
        head += read(len(head), 8 + length)
    if len(head) < 8 + length:
        raise ValueError(f"truncated: the header has {length} bytes, found {len(head) - 8}")
    tensors = json.loads(head[8 : 8 + length])
    if not isinstance(tensors, dict):
        raise ValueError("the header is not a JSON object")  # noqa: TRY004 - one kind of error for every broken file
    return Header(tensors, 8 + length)


def tensor_of(header: Header, name: str, data: bytes) -> RawTensor:
    """Wrap the bytes of `header.span(name)`. Raises `ValueError` when they are too few."""
    start, stop = header.span(name)
    if len(data) != stop - start:
        raise ValueError(f"truncated: tensor {name!r} has {stop - start} bytes, found {len(data)}")
    entry = header.tensors[name]
    return RawTensor(str(entry["dtype"]), tuple(entry["shape"]), data)
