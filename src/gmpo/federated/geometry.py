"""Norms, angles and the geometric median of updates, all from their inner products.

Whatever is a weighted sum of the clients' updates d_1..d_K, z = sum_k a_k d_k, has its length and
its distances in the K x K matrix of inner products <d_i, d_j>. So updates of any size are read
once, and everything else is arithmetic on a few numbers.

Dimensions: **K** clients.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from gmpo.federated.updates import ClientUpdate
from gmpo.stored_tensors import PIECE

__all__ = ["cosines", "geometric_median", "inner_products", "norm"]

_SMOOTHING = 1e-6
"""Distances below this part of the median norm count as such, or one at a client divides by 0."""
_TOLERANCE = 1e-12
_MOST_ITERATIONS = 10_000


def inner_products(updates: Sequence[ClientUpdate]) -> Float[np.ndarray, "K K"]:
    """<d_i, d_j> of all updates, summed up in fp64.

    The row and the column of an update with a value that is not finite are not finite.

    Raises:
        ModelError: a file was cut short.
    """
    found = np.zeros((len(updates), len(updates)))
    size = max(PIECE // len(updates), 1)
    # What is not finite is the caller's to tell of, not numpy's.
    with np.errstate(invalid="ignore", over="ignore"):
        for name in updates[0].tensors:
            readers = [update.tensors[name].pieces(size) for update in updates]
            for pieces in zip(*readers, strict=True):
                values = np.stack(pieces).astype(np.float64)
                found += values @ values.T
    return found


def norm(inner: Float[np.ndarray, "K K"], weights: Float[np.ndarray, " K"]) -> float:
    """Length of sum_k weights_k d_k."""
    return float(np.sqrt(max(weights @ inner @ weights, 0.0)))


def cosines(
    inner: Float[np.ndarray, "K K"], weights: Float[np.ndarray, " K"]
) -> Float[np.ndarray, " K"]:
    """Cosine of each update with sum_k weights_k d_k; 0 where one of the two has no length."""
    lengths = np.sqrt(np.diag(inner)) * norm(inner, weights)
    products = inner @ weights
    found = np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)
    clipped: Float[np.ndarray, " K"] = np.clip(found, -1.0, 1.0)  # of rounding
    return clipped


def geometric_median(
    inner: Float[np.ndarray, "K K"], weights: Float[np.ndarray, " K"]
) -> Float[np.ndarray, " K"]:
    """Coefficients a, at least 0 and of sum 1, of the geometric median z = sum_k a_k d_k.

        z = argmin sum_k w_k |z - d_k|                 Pillutla et al. 2022, "RFA", equation (2)

    found by their smoothed Weiszfeld steps, a_k proportional to w_k / max(v, |z - d_k|). Fewer than
    half of the weight, however far off, moves z by a bounded amount, where it moves the mean by as
    much as it likes.

    Args:
        inner: of the updates, finite.
        weights: w, at least 0, not all 0.
    """
    squares = np.diag(inner)
    lengths = np.sqrt(squares)
    found: Float[np.ndarray, " K"] = weights / weights.sum()
    # The mean where half of them changed nothing.
    least = _SMOOTHING * float(np.median(lengths) or lengths.mean())
    if least == 0:
        return found
    apart = np.maximum(squares[:, None] + squares[None, :] - 2 * inner, 0.0)
    before = np.inf
    for _ in range(_MOST_ITERATIONS):
        # |z - d_k|^2 by pairs of updates, for sum a = 1: no large numbers that cancel.
        distances = np.sqrt(np.maximum(apart @ found - found @ apart @ found / 2, 0.0))
        total = float(weights @ distances)
        if before - total <= _TOLERANCE * total:
            break
        before = total
        pulls = weights / np.maximum(distances, least)
        found = pulls / pulls.sum()
    return found
