"""Tensors of safetensors files, read and written a piece at a time, without torch.

A model that does not fit into memory twice can still be compared, averaged and digested so.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmpo.errors import ModelError

__all__ = ["PIECE", "StoredTensor", "read_header", "stored_tensors", "write_tensors"]

PIECE = 1 << 22
"""Values read at a time unless told."""

_LONGEST_HEADER = 100_000_000
"""Bytes, as in the library."""

_KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""numpy's name of each number format; it has none for bf16, whose bits are the upper half of fp32's
and are read as such."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor's bytes are: of which file, in which format, from where, to where."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    start: int
    end: int

    def pieces(self, size: int = PIECE) -> Iterator[NDArray[np.float32]]:
        """Its values in fp32, one after another.

        Args:
            size: values of a piece; the last may be shorter.

        Raises:
            ModelError: they are not stored as a plain floating-point format, or the file was cut
                short since its header was read.
        """
        kind = _KINDS.get(self.kind)
        if kind is None:
            raise ModelError(
                f"{self.file} holds weights as {self.kind}; a version is a digest of "
                f"{', '.join(_KINDS)}: dequantise the model first"
            )
        with self.file.open("rb") as file:
            file.seek(self.start)
            left = self.end - self.start
            while left:
                wanted = min(size * np.dtype(kind).itemsize, left)
                raw = file.read(wanted)
                if len(raw) < wanted:
                    raise ModelError(f"{self.file} was cut short while it was read; restore it")
                left -= wanted
                yield _widened(raw, kind)


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """A safetensors file's tensors by name, and its metadata.

    The file begins with the header's length in 8 bytes, then has the header in JSON, then the
    tensors.

    Raises:
        ModelError: it is damaged or cut short.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _LONGEST_HEADER):
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(file.read(length))
        metadata = dict(header.pop("__metadata__", {}))
        tensors = {}
        for name, entry in header.items():
            kind, shape, offsets = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if any(type(number) is not int or number < 0 for number in (*shape, *offsets)):
                raise ValueError(f"tensor {name!r} has sizes that are none")
            start, end = (8 + length + at for at in offsets)
            if not start <= end <= size:
                raise ValueError(f"tensor {name!r} is at bytes {start} to {end} of {size}")
            if kind in _KINDS and end - start != np.dtype(_KINDS[kind]).itemsize * math.prod(shape):
                raise ValueError(f"tensor {name!r} has {end - start} bytes for shape {shape}")
            tensors[name] = StoredTensor(file=path, kind=kind, shape=shape, start=start, end=end)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        struct.error,
    ) as error:
        raise ModelError(f"{path} is damaged or cut short: {error}; restore it") from None
    return tensors, metadata


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder's safetensors by name.

    Raises:
        ModelError: a file is damaged, or two hold a tensor of one name.
    """
    found: dict[str, StoredTensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in read_header(path)[0].items():
            if name in found:
                raise ModelError(
                    f"tensor {name!r} is in {found[name].file.name} and in {path.name} of "
                    f"{folder}; leave one of them there"
                )
            found[name] = tensor
    return found


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    pieces: Iterable[NDArray[np.float32]],
    *,
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file of fp32 tensors.

    Args:
        path: of the file.
        shapes: of the tensors by name, in their order.
        pieces: all their values, one after another; a piece may not go beyond its tensor.
        metadata: texts that the header keeps.

    Raises:
        OSError: the disk does not take it.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin where fp64 may
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for piece in pieces:
            file.write(piece.astype("<f4", copy=False).tobytes())
        assert file.tell() == 8 + len(text) + at, "as many values as the shapes say"


def _widened(raw: bytes, kind: str) -> NDArray[np.float32]:
    stored = np.frombuffer(raw, kind)
    if kind == _KINDS["BF16"]:
        return (stored.astype("<u4") << 16).view("<f4")
    return stored.astype("<f4", copy=False)
