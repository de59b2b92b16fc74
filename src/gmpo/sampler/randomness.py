"""Randomness that belongs to the work, not to the process."""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Float64

__all__ = ["uniforms"]


def uniforms(key: tuple[int | str, ...], *, count: int) -> Float64[np.ndarray, " N"]:
    """The first `count` uniforms in [0, 1) of the counter-based stream that `key` names.

    Position t of a completion always gets number t of its stream, so batching, refill and the
    number of processes do not change what is sampled.

    Args:
        key: e.g. (seed, round, prompt id, index); order and types matter.
        count: how many numbers; a longer stream starts with the shorter one.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    stream = np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64))
    return np.random.Generator(stream).random(count)
