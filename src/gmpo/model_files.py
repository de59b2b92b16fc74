"""A model's folder on disk, read without torch: its files and the digest of its weights."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gmpo.errors import ModelError

__all__ = ["file_digest", "holds_adapter", "holds_weights", "model_paths", "weights_version"]

_ADAPTER = "adapter_config.json"
_CONFIG = "config.json"
_PIECE = 1 << 24
"""Bytes read at a time."""

_KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""numpy's name of each number format; it has none for bf16, whose bits are the upper half of fp32's
and are read as such."""


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """Where a tensor's bytes are: of which file, from where, to where."""

    file: Path
    kind: str
    start: int
    end: int


def holds_adapter(folder: Path) -> bool:
    """Whether this is a folder with an adapter, not a whole model."""
    return (folder / _ADAPTER).is_file() and not (folder / _CONFIG).is_file()


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds a model or an adapter whose weights are safetensors."""
    described = (folder / _CONFIG).is_file() or (folder / _ADAPTER).is_file()
    return described and any(folder.glob("*.safetensors"))


def model_paths(folder: Path) -> list[Path]:
    """Every file of a model's folder, in one order; names that begin with a dot are none of it."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_version(folder: Path) -> str:
    """The digest of the weights in a folder: 16 hexadecimal digits that identify them anywhere.

    It is over names and values, widened to fp32, so a file in other shards or with other metadata
    is the same version, and what serves them in a lower precision still serves this version. It
    equals `policy.load.model_version` of the model loaded in fp32. An adapter's is over its
    factors, their scale and the name of its base.

    Raises:
        ModelError: the folder holds no safetensors, or they are damaged or of a format that is not
            a plain floating-point one.
    """
    if not holds_weights(folder):
        raise ModelError(
            f"{folder} holds no model: it needs {_CONFIG} (or {_ADAPTER}) and *.safetensors; name "
            "the folder of a checkpoint's model, or what gmpo export wrote"
        )
    digest = hashlib.sha256()
    settings = _settings(folder / (_ADAPTER if holds_adapter(folder) else _CONFIG))
    tensors = _tensors(folder)
    if holds_adapter(folder):
        shown = ("base_model_name_or_path", "r", "lora_alpha")
        digest.update(json.dumps([settings.get(name) for name in shown]).encode())
    elif settings.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)  # some files hold the one matrix under both names
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        for piece in _widened(tensor):
            digest.update(piece)
    return digest.hexdigest()[:16]


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}; restore the folder") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} is no JSON object; restore the folder")
    return found


def _tensors(folder: Path) -> dict[str, _Tensor]:
    """Every tensor of the folder's safetensors by name."""
    found: dict[str, _Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in _header(path):
            if name in found:
                raise ModelError(
                    f"tensor {name!r} is in {found[name].file.name} and in {path.name} of "
                    f"{folder}; leave one of them there"
                )
            found[name] = tensor
    return found


def _header(path: Path) -> Iterator[tuple[str, _Tensor]]:
    """A safetensors file: the header's length in 8 bytes, the header in JSON, the tensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError(f"its header of {length} bytes is longer than the file")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = (8 + length + at for at in entry["data_offsets"])
            if end > size:
                raise ValueError(f"tensor {name!r} ends at byte {end} of {size}")
            yield name, _Tensor(file=path, kind=entry["dtype"], start=start, end=end)
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ModelError(f"{path} is damaged or cut short: {error}; restore it") from None


def _widened(tensor: _Tensor) -> Iterator[bytes]:
    """A tensor's values in fp32, a piece at a time."""
    kind = _KINDS.get(tensor.kind)
    if kind is None:
        raise ModelError(
            f"{tensor.file} holds weights as {tensor.kind}; a version is a digest of "
            f"{', '.join(_KINDS)}: dequantise the model first"
        )
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        left = tensor.end - tensor.start
        while left:
            raw = file.read(min(_PIECE, left))
            if not raw:
                raise ModelError(f"{tensor.file} was cut short while it was read; restore it")
            left -= len(raw)
            if tensor.kind == "F32":
                yield raw
            elif tensor.kind == "BF16":
                yield (np.frombuffer(raw, kind).astype("<u4") << 16).tobytes()
            else:
                yield np.frombuffer(raw, kind).astype("<f4").tobytes()
