"""Named weights put into a model, all of them or none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from gmpo.errors import ModelError

__all__ = ["copy_weights"]


@torch.no_grad()
def copy_weights(
    weights: Mapping[str, Tensor], named_tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Copy tensors into the weights of the same names; one that is given itself stays as it is.

    Raises:
        ModelError: names or shapes are not exactly those of the weights; nothing was copied.
    """
    given = dict(named_tensors)
    if given.keys() != weights.keys():
        odd = sorted(given.keys() ^ weights.keys())
        raise ModelError(f"weights are of another model: {len(odd)} names differ, e.g. {odd[:3]}")
    for name, weight in weights.items():
        if given[name].shape != weight.shape:
            raise ModelError(
                f"weight {name} has shape {tuple(given[name].shape)}, "
                f"this model needs {tuple(weight.shape)}"
            )
    for name, weight in weights.items():
        if weight.data_ptr() != given[name].data_ptr():
            weight.copy_(given[name])
