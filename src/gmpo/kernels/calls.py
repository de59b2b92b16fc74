"""Compiled functions as Python callables over the addresses of tensors.

A caller asks for a function by name and precision, and runs torch's operations where there is none.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gmpo.kernels.library import loaded

__all__ = ["address", "kernel"]

_SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "float"}
_TYPES: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


def kernel(name: str, arguments: str, like: Tensor) -> Callable[..., None] | None:
    """The function for tensors like this one; None where torch's operations are to run.

    Args:
        name: without the precision.
        arguments: a letter each: p for an address, i for a 64-bit integer, f for a float.
        like: it must lie on the CPU in bf16 or fp32.
    """
    library = loaded()
    suffix = _SUFFIXES.get(like.dtype)
    if library is None or suffix is None or like.device.type != "cpu":
        return None
    return _bound(library, f"{name}_{suffix}", arguments)


def address(tensor: Tensor | None) -> int | None:
    """Where a contiguous tensor's first element lies; None stands for no tensor."""
    if tensor is None:
        return None
    assert tensor.is_contiguous(), "a compiled function reads its tensors end to end"
    return tensor.data_ptr()


@functools.cache
def _bound(library: ctypes.CDLL, name: str, arguments: str) -> Callable[..., None]:
    function: Any = library[name]
    function.argtypes = [_TYPES[letter] for letter in arguments]
    function.restype = None
    bound: Callable[..., None] = function
    return bound
