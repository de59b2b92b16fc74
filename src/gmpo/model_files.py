"""A model's folder on disk, read without torch: its files and the digest of its weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from gmpo.errors import ModelError
from gmpo.stored_tensors import StoredTensor, stored_tensors

__all__ = [
    "file_digest",
    "holds_adapter",
    "holds_weights",
    "model_paths",
    "model_tensors",
    "weights_version",
]

_ADAPTER = "adapter_config.json"
_CONFIG = "config.json"


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
    tensors = model_tensors(folder)
    if holds_adapter(folder):
        shown = ("base_model_name_or_path", "r", "lora_alpha")
        digest.update(json.dumps([settings.get(name) for name in shown]).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        for piece in tensor.pieces():
            digest.update(piece.tobytes())
    return digest.hexdigest()[:16]


def model_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model's or an adapter's folder by name, each once.

    Raises:
        ModelError: the folder's files are damaged.
    """
    tensors = stored_tensors(folder)
    if not holds_adapter(folder) and _settings(folder / _CONFIG).get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)  # some files hold the one matrix under both names
    return tensors


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}; restore the folder") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} is no JSON object; restore the folder")
    return found
