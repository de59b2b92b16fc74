"""A decoding step's addition and norm as one GPU kernel, in Triton, which comes with torch there.

What `decoding.add_norm` gives, which runs torch's operations where there is no Triton.

Dimensions: as in `decoding`.
"""

import functools
import importlib.util
import subprocess

import torch
from torch import Tensor

__all__ = ["add_norm", "adds_norm", "has_triton"]

_LARGEST = 2**14
"""Hidden size: a row is held in registers."""

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def _add_norm(  # noqa: PLR0913 (a kernel has no records)
        stream,
        added,
        weight,
        normed,
        size,
        eps,
        HAS_ADDED: tl.constexpr,
        WIDE: tl.constexpr,
    ):
        """One row: the sum is written back, and its norm beside it."""
        places = tl.arange(0, WIDE)
        is_here = places < size
        offsets = tl.program_id(0).to(tl.int64) * size + places
        values = tl.load(stream + offsets, mask=is_here, other=0.0)
        if HAS_ADDED:
            values += tl.load(added + offsets, mask=is_here, other=0.0).to(tl.float32)
            tl.store(stream + offsets, values, mask=is_here)
        scale = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / size + eps)
        weights = tl.load(weight + places, mask=is_here, other=0.0)
        # Rounded before the weight multiplies, as torch's operations do.
        scaled = (values * scale).to(weights.dtype)
        tl.store(normed + offsets, scaled.to(tl.float32) * weights.to(tl.float32), mask=is_here)


def adds_norm(stream: Tensor, added: Tensor | None, weight: Tensor) -> bool:
    """Whether `add_norm` takes these."""
    return (
        stream.device.type == "cuda"
        and stream.dtype == torch.float32
        and stream.is_contiguous()
        and (added is None or added.is_contiguous())
        and stream.shape[-1] <= _LARGEST
        and weight.dtype != torch.float64
        and has_triton()
    )


def add_norm(stream: Tensor, added: Tensor | None, weight: Tensor, *, eps: float) -> Tensor:
    """Add to the stream in place, and its RMS norm in the weight's precision."""
    normed = torch.empty_like(stream, dtype=weight.dtype)
    rows, size = stream.shape
    wide = 1 << (size - 1).bit_length()
    _add_norm[(rows,)](
        stream, added, weight, normed, size, eps, HAS_ADDED=added is not None, WIDE=wide
    )
    return normed


@functools.cache
def has_triton() -> bool:
    """Whether a kernel can be built and run: Triton needs a C compiler for what starts kernels."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        stream = torch.ones(1, 16, device="cuda")
        add_norm(stream, None, stream[0], eps=0.0)
    except (OSError, RuntimeError, subprocess.SubprocessError, triton.TritonError):
        return False  # whatever it lacks, torch's operations do the same
    return True
