"""The digests by which weights are known outside a run, from a checkpoint's files."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["WeightsVersion", "weights_version"]


@dataclass(frozen=True, kw_only=True)
class WeightsVersion:
    """One model under two digests: rounded weights are other weights.

    Attributes:
        fp32: as they are, and as `gmpo serve --dtype fp32` names them.
        bf16: rounded, as `gmpo serve --dtype bf16` names them.
    """

    fp32: str
    bf16: str


def weights_version(folder: Path) -> WeightsVersion | None:
    """What `gmpo.policy.load.model_version` says of the model in a folder, without loading it.

    It reads all weights once, a few seconds for the default model. Adapters are known by another
    digest, together with their base; a folder without weights of a whole model has none.

    Args:
        folder: of fp32 safetensors, whose parameters are all that they hold.
    """
    from safetensors import safe_open

    fp32, bf16 = hashlib.sha256(), hashlib.sha256()
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for path in folder.glob("model*.safetensors"):
            opened = stack.enter_context(safe_open(path, framework="numpy"))
            files |= dict.fromkeys(opened.keys(), opened)
        for name in sorted(files):
            tensor = np.ascontiguousarray(files[name].get_tensor(name), dtype=np.float32)
            for digest, weights in ((fp32, tensor), (bf16, _rounded(tensor))):
                digest.update(name.encode())
                digest.update(weights.data)
    return WeightsVersion(fp32=fp32.hexdigest()[:16], bf16=bf16.hexdigest()[:16]) if files else None


def _rounded(weights: np.ndarray) -> np.ndarray:
    """The nearest bf16 numbers, ties to the even one, kept in fp32: its upper 16 bits."""
    bits = weights.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)
