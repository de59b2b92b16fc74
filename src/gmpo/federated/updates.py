"""A client's update: what its training changed, in a file that may travel by any way.

The file is safetensors: trained minus initial weights in fp32 by name, and in the header who made
it, from which version, on how many sequences. Adapters are merged before they come here: the mean
of the clients' products B A is exact, while the product of their mean factors is another matrix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmpo.errors import FederationError, ModelError
from gmpo.federated.settings import CLIENT_NAME, MOST_UPDATES
from gmpo.flushing import flush_file, flush_names
from gmpo.model_files import holds_adapter, model_tensors, weights_version
from gmpo.stored_tensors import StoredTensor, read_header, write_tensors

__all__ = [
    "ClientUpdate",
    "read_update",
    "require_alike",
    "require_shapes_of",
    "write_update",
]

_KEY = "gmpo_update"
_FORMAT = 1
_MOST_SEQUENCES = 2**53
_VERSION = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, kw_only=True)
class ClientUpdate:
    """What one client's training changed.

    Attributes:
        client: its name.
        base: version of the weights that it began with.
        model: version of the weights that it ended with.
        sequences: completions that it trained on; by its own account.
        file: that holds the differences.
        tensors: they, trained minus initial weight, by name.
    """

    client: str
    base: str
    model: str
    sequences: int
    file: Path
    tensors: Mapping[str, StoredTensor]


def write_update(
    file: Path, *, client: str, base: Path, model: Path, sequences: int
) -> ClientUpdate:
    """Write what a client's training changed.

    Args:
        file: gets its name once everything in it is on the disk.
        client: its name.
        base: folder of the whole model that the client began with.
        model: folder of the whole model that it ended with.
        sequences: completions that it trained on.

    Raises:
        FederationError: the two are not one architecture's, or one is an adapter.
        ModelError: a folder holds no weights, or damaged ones.
        OSError: the disk does not take it.
    """
    before, after = _whole_model(base), _whole_model(model)
    _require_same_shapes(_shapes(before), _shapes(after), what=f"{model} and {base}")
    facts = {
        "format": _FORMAT,
        "client": client,
        "base": weights_version(base),
        "model": weights_version(model),
        "sequences": sequences,
    }
    partial = file.with_name(f".{file.name}.partial")
    try:
        write_tensors(
            partial,
            _shapes(before),
            _differences(before, after),
            metadata={_KEY: json.dumps(facts)},
        )
        flush_file(partial)
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)
    flush_names(file.parent)
    return read_update(file)


def read_update(file: Path) -> ClientUpdate:
    """An update's file; its values are read when they are asked for.

    Raises:
        FederationError: it is no update, or of another version of this program.
        ModelError: it is damaged or cut short.
    """
    tensors, metadata = read_header(file)
    if _KEY not in metadata:
        raise FederationError(
            f"{file} is no client's update: its header has no {_KEY}; gmpo federate update writes "
            "one from a run"
        )
    try:
        facts = json.loads(metadata[_KEY])
        made_by = facts["format"]
        if made_by == _FORMAT:
            return _update(file, facts, tensors)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FederationError(f"{file}: its account of itself is damaged: {error!r}") from None
    raise FederationError(
        f"{file} is an update of format {made_by!r}; this version reads {_FORMAT}"
    )


def require_alike(updates: Sequence[ClientUpdate]) -> None:
    """Refuse updates that cannot be aggregated: of other weights, shapes, or one client twice.

    Raises:
        FederationError: they differ in what is named, or there is none.
    """
    if not 0 < len(updates) <= MOST_UPDATES:
        raise FederationError(
            f"there are {len(updates)} updates to aggregate; give 1 to {MOST_UPDATES}"
        )
    first, *others = updates
    for other in others:
        if other.base != first.base:
            raise FederationError(
                f"{other.client} began with version {other.base} and {first.client} with "
                f"{first.base}; only updates of one round's model can be aggregated"
            )
        _require_same_shapes(
            _shapes(first.tensors), _shapes(other.tensors), what=f"{other.file} and {first.file}"
        )
    names = [update.client for update in updates]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise FederationError(
            f"{', '.join(twice)} sent more than one update; each client counts once: give one"
        )


def require_shapes_of(
    updates: Sequence[ClientUpdate], tensors: Mapping[str, StoredTensor], *, base: Path
) -> None:
    """Refuse updates whose header names the base and whose tensors are not its.

    Raises:
        FederationError: a name or a shape is another.
    """
    for update in updates:
        _require_same_shapes(
            _shapes(tensors), _shapes(update.tensors), what=f"{update.file} and {base}"
        )


def _update(
    file: Path, facts: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> ClientUpdate:
    sequences = facts["sequences"]
    if type(sequences) is not int or not 0 <= sequences <= _MOST_SEQUENCES:
        raise ValueError(f"sequences must be a whole number from 0 to {_MOST_SEQUENCES}")
    if not CLIENT_NAME.fullmatch(facts["client"]):
        raise ValueError(f"client is {facts['client']!r}, which is no client's name")
    for key in ("base", "model"):
        if not _VERSION.fullmatch(facts[key]):
            raise ValueError(f"{key} is {facts[key]!r}, which is no version")
    odd = sorted({tensor.kind for tensor in tensors.values()} - {"F32"})
    if odd:
        raise ValueError(f"tensors are {', '.join(odd)}, and must be F32")
    return ClientUpdate(
        client=facts["client"],
        base=facts["base"],
        model=facts["model"],
        sequences=sequences,
        file=file,
        tensors=tensors,
    )


def _whole_model(folder: Path) -> dict[str, StoredTensor]:
    if holds_adapter(folder):
        raise FederationError(
            f"{folder} is an adapter; an update is of the whole model, adapters merged: gmpo "
            "export RUN FOLDER writes that"
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no model: it has no config.json")
    return dict(sorted(model_tensors(folder).items()))


def _shapes(tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _require_same_shapes(
    one: Mapping[str, tuple[int, ...]], other: Mapping[str, tuple[int, ...]], *, what: str
) -> None:
    odd = sorted(one.items() ^ other.items())
    if odd:
        names = sorted({name for name, _ in odd})
        raise FederationError(
            f"{what} are of different models: {len(names)} tensors differ in name or shape, e.g. "
            f"{names[0]!r}; all clients train one architecture"
        )


def _differences(
    before: Mapping[str, StoredTensor], after: Mapping[str, StoredTensor]
) -> Iterator[NDArray[np.float32]]:
    for name, tensor in before.items():
        for old, new in zip(tensor.pieces(), after[name].pieces(), strict=True):
            yield (new.astype(np.float64) - old).astype(np.float32)
