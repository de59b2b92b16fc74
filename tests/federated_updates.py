"""Clients' updates made by hand, and a model folder that they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from safetensors.numpy import save_file

from gmpo.federated.updates import ClientUpdate, read_update

BASE = "0123456789abcdef"


def facts_of(client: str, *, sequences: object = 1, base: str = BASE) -> dict[str, object]:
    """What an update's header says of it."""
    return {
        "format": 1,
        "client": client,
        "base": base,
        "model": "f" * 16,
        "sequences": sequences,
    }


def update_of(
    folder: Path,
    client: str,
    values: Mapping[str, ArrayLike] | ArrayLike,
    *,
    sequences: int = 1,
    base: str = BASE,
) -> ClientUpdate:
    """An update of these differences; one array is that of a tensor "w"."""
    tensors = values if isinstance(values, Mapping) else {"w": values}
    facts = facts_of(client, sequences=sequences, base=base)
    file = folder / f"{client}.safetensors"
    save_file(
        {name: np.asarray(value, dtype=np.float32) for name, value in tensors.items()},
        file,
        metadata={"gmpo_update": json.dumps(facts)},
    )
    return read_update(file)


def updates_of(folder: Path, rows: Sequence[ArrayLike], **same: int) -> list[ClientUpdate]:
    """An update a row, of clients a, b, c ..."""
    return [update_of(folder, chr(97 + place), row, **same) for place, row in enumerate(rows)]
