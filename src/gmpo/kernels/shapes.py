"""Rows that are added to a table, so that its matrix products have sizes that were seen before.

oneDNN, which multiplies bf16 matrices on a CPU, makes a program for every shape it is given, which
takes time, and keeps it, which takes memory. A training step has a number of tokens of its own, and
with it some thirty shapes. Rounded up to a multiple of 32 it has one of a
few dozen sizes, whose programs are there after the first rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gmpo.kernels.attention import is_compiled

__all__ = ["ROWS_OF_A_SHAPE", "spare_rows"]

ROWS_OF_A_SHAPE = 32


def spare_rows(count: int, *, like: Tensor) -> int:
    """Rows to add to `count` of them before products with a weight; 0 where nothing is gained.

    Args:
        count: rows of the table; none stay none.
        like: the weight. In bf16 on a CPU, and where tables may have rows that no other function
            looks at, sizes are rounded up.
    """
    if like.dtype != torch.bfloat16 or not is_compiled(like):
        return 0
    return -count % ROWS_OF_A_SHAPE
