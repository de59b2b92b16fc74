"""From clients' updates to the next model: screened, weighed, put together.

    theta' = theta + s sum_k a_k d_k                 d_k: a client's trained minus initial weights

With the rule `mean`, a_k is w_k / sum w and w_k = n_k prod_j score_kj^e_j: n_k sequences, scores in
[0, 1] that the server measured, exponents e_j. One local step of plain gradient descent on
w_k = n_k is the centralised step on all sequences, because the objective is a mean over them.

That is also what a geometric mean of clients soundly is. The log-linear pool, pi(a|s) proportional
to prod_k pi_k(a|s)^a_k, has the averaged logits; where logits are linear in the weights it is the
policy of the averaged weights, and near a common start it is so to first order (`pool.py` measures
what is left). A geometric mean of the updates themselves does not exist: they have signs.

Dimensions: **K** clients.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from gmpo.errors import FederationError, TooFewUpdates
from gmpo.federated.geometry import cosines, geometric_median, inner_products, norm
from gmpo.federated.settings import AggregationSettings, Rule, Score
from gmpo.federated.updates import ClientUpdate, require_alike, require_shapes_of
from gmpo.flushing import move_whole
from gmpo.model_files import model_paths, model_tensors, weights_version
from gmpo.stored_tensors import PIECE, StoredTensor, write_tensors

__all__ = [
    "Aggregation",
    "ClientShare",
    "Screened",
    "aggregate",
    "require_aggregable",
    "screen",
    "write_aggregate",
]


_LEAST_MAJORITY = 3
"""Updates of which most may be alike."""

_WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf")


@dataclass(frozen=True, kw_only=True)
class ClientShare:
    """What became of one client's update.

    Attributes:
        client: its name.
        sequences: that it trained on, by its own account.
        norm: length of its update; None if that is not finite.
        cosine: with the geometric median of the updates that are not too long.
        scores: that its weight depends on.
        weight: a_k, its coefficient in the aggregated update before the step size; 0 if left out.
        left_out: why it was left out; empty if it was not.
    """

    client: str
    sequences: int
    norm: float | None
    cosine: float
    scores: Mapping[Score, float]
    weight: float
    left_out: str


@dataclass(frozen=True, kw_only=True)
class Aggregation:
    """An aggregated update: its coefficients, and why they are what they are.

    Attributes:
        rule: by which it was made.
        shares: of the clients, in the order of their updates.
        step_size: that the sum is multiplied by.
        norm: its length, the step size in it.
    """

    rule: Rule
    shares: tuple[ClientShare, ...]
    step_size: float
    norm: float

    @property
    def weights(self) -> Float[np.ndarray, " K"]:
        """Coefficients of the updates, their sum 1."""
        return np.array([share.weight for share in self.shares])

    @property
    def left_out(self) -> dict[str, str]:
        """Why, by client, of those that were."""
        return {share.client: share.left_out for share in self.shares if share.left_out}

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Screened:
    """Updates as the server sees them before it weighs them.

    Attributes:
        inner: their inner products; rows of updates that are not finite are 0.
        is_finite: whether all values of each are.
        cosines: with the geometric median of those that are finite and not too long.
        left_out: why, by place, of those that are not taken.
    """

    inner: Float[np.ndarray, "K K"]
    is_finite: Bool[np.ndarray, " K"]
    cosines: Float[np.ndarray, " K"]
    left_out: Mapping[int, str]


def screen(updates: Sequence[ClientUpdate], settings: AggregationSettings) -> Screened:
    """Which updates may count: finite, no longer than others, in a direction that others share.

    Both limits are relative to a median, so that fewer than half of the clients cannot move them
    far: of the lengths first, then of those that are left. Of two there is no majority, and neither
    limit is asked which of them is off.

    Raises:
        FederationError: the updates are not of one round's model.
        ModelError: a file is damaged.
    """
    require_alike(updates)
    inner = inner_products(updates)
    left_out: dict[int, str] = {}
    finite = np.isfinite(np.diag(inner))
    for place in np.flatnonzero(~finite):
        left_out[int(place)] = "a value is NaN or infinite"
        inner[place, :] = inner[:, place] = 0.0
    if not finite.any():
        nothing = np.zeros(len(updates))
        return Screened(inner=inner, is_finite=finite, cosines=nothing, left_out=left_out)
    is_majority = finite.sum() >= _LEAST_MAJORITY
    lengths = np.sqrt(np.diag(inner))
    typical = float(np.median(lengths[finite]))
    is_short = finite.copy()
    if is_majority and typical > 0:
        is_short &= lengths <= settings.largest_norm * typical
    for place in np.flatnonzero(finite & ~is_short):
        left_out[int(place)] = (
            f"its length is {lengths[place] / typical:.3g} times the median, beyond largest_norm "
            f"{settings.largest_norm:g}"
        )
    found = cosines(inner, geometric_median(inner, is_short.astype(np.float64)))
    if is_majority:
        for place in np.flatnonzero(is_short & (lengths > 0) & (found < settings.least_cosine)):
            left_out[int(place)] = (
                f"its cosine with the geometric median is {found[place]:.3f}, below least_cosine "
                f"{settings.least_cosine:g}"
            )
    return Screened(inner=inner, is_finite=finite, cosines=found, left_out=left_out)


def aggregate(
    updates: Sequence[ClientUpdate],
    settings: AggregationSettings,
    *,
    screened: Screened | None = None,
    accuracies: Mapping[str, float] | None = None,
    num_clients: int | None = None,
) -> Aggregation:
    """The coefficients of the updates in the next model.

    Args:
        updates: of one round.
        settings: rule, limits, exponents.
        screened: of these updates, if they were screened before.
        accuracies: of each client's own model in [0, 1], by name; needed where they count.
        num_clients: that were asked, those included that sent nothing; None is those that did.

    Raises:
        FederationError: the updates are not of one round's model, or an accuracy is missing.
        TooFewUpdates: fewer are left than `min_clients`.
        ModelError: a file is damaged.
    """
    seen = screen(updates, settings) if screened is None else screened
    left_out = dict(seen.left_out)
    scores = [
        _scores(update, settings, accuracies or {}, cosine=float(cosine))
        for update, cosine in zip(updates, seen.cosines, strict=True)
    ]
    own = np.array([_weight(*pair, settings) for pair in zip(updates, scores, strict=True)])
    for place in map(int, np.flatnonzero(own == 0)):
        zeros = [name for name, score in scores[place].items() if score == 0]
        why = f"its {' and '.join(zeros)} is 0" if zeros else "its weight is 0"
        if not updates[place].sequences:
            why = "it trained on no sequence"
        left_out.setdefault(place, why)
    counted = np.array([place not in left_out for place in range(len(updates))])
    _require_enough(updates, left_out, settings, num_clients or len(updates))
    weights = np.where(counted, own, 0.0)
    if settings.rule == "geometric_median":
        coefficients = np.zeros(len(updates))
        places = np.flatnonzero(counted)
        coefficients[places] = geometric_median(seen.inner[np.ix_(places, places)], weights[places])
    else:
        coefficients = weights / weights.sum()
    shares = tuple(
        ClientShare(
            client=update.client,
            sequences=update.sequences,
            norm=float(np.sqrt(seen.inner[place, place])) if seen.is_finite[place] else None,
            cosine=float(seen.cosines[place]),
            scores=scores[place],
            weight=float(coefficients[place]),
            left_out=left_out.get(place, ""),
        )
        for place, update in enumerate(updates)
    )
    return Aggregation(
        rule=settings.rule,
        shares=shares,
        step_size=settings.step_size,
        norm=settings.step_size * norm(seen.inner, coefficients),
    )


def write_aggregate(
    destination: Path,
    *,
    base: Path,
    updates: Sequence[ClientUpdate],
    aggregation: Aggregation,
    origin: Mapping[str, Any],
) -> str:
    """Write the next model to a new folder, in fp32, and return its version.

    Args:
        destination: must not exist; gets its name once everything in it is on the disk.
        base: folder of the model that the clients began with; its other files are copied.
        updates: of the round.
        aggregation: of these updates.
        origin: kept as `gmpo.json` in the folder.

    Raises:
        FederationError: the updates did not begin with `base` or have other tensors, or the
            destination exists.
        ModelError: a file is damaged.
        OSError: the disk does not take it.
    """
    require_aggregable(destination, base=base, updates=updates)
    tensors = dict(sorted(model_tensors(base).items()))
    partial = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _copy_descriptions(base, partial)
        (partial / "gmpo.json").write_text(json.dumps(origin, indent=1), encoding="utf-8")
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        moved = _moved(tensors, updates, aggregation.step_size * aggregation.weights)
        write_tensors(partial / "model.safetensors", shapes, moved, metadata={"format": "pt"})
        move_whole(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return weights_version(destination)


def require_aggregable(destination: Path, *, base: Path, updates: Sequence[ClientUpdate]) -> None:
    """Refuse what `write_aggregate` would, before anything is read.

    Raises:
        FederationError: the updates did not begin with `base` or have other tensors, or the
            destination exists.
        ModelError: a file is damaged.
    """
    if destination.exists() or destination.is_symlink():
        raise FederationError(f"{destination} exists and is not overwritten; name a new folder")
    require_alike(updates)
    version = weights_version(base)
    if version != updates[0].base:
        raise FederationError(
            f"the updates are of a model of version {updates[0].base}, and {base} is {version}; "
            "name the folder of the model that the clients began with"
        )
    require_shapes_of(updates, model_tensors(base), base=base)


def _moved(
    tensors: Mapping[str, StoredTensor],
    updates: Sequence[ClientUpdate],
    coefficients: Float[np.ndarray, " K"],
) -> Iterator[NDArray[np.float32]]:
    # An update of coefficient 0 may hold NaN.
    counted = [(a, u) for a, u in zip(coefficients, updates, strict=True) if a != 0]
    size = PIECE // (1 + len(counted))
    for name, tensor in tensors.items():
        readers = [update.tensors[name].pieces(size) for _, update in counted]
        for before, *differences in zip(tensor.pieces(size), *readers, strict=True):
            total = before.astype(np.float64)
            for (coefficient, _), difference in zip(counted, differences, strict=True):
                total += coefficient * difference
            yield total.astype(np.float32)


def _copy_descriptions(base: Path, folder: Path) -> None:
    """Everything of a model's folder but its weights; they will be fp32."""
    for path in model_paths(base):
        if path.name.endswith(_WEIGHT_FILES):
            continue
        to = folder / path.relative_to(base)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to)
    config = folder / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings |= {key: "float32" for key in ("dtype", "torch_dtype") if key in settings}
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _scores(
    update: ClientUpdate,
    settings: AggregationSettings,
    accuracies: Mapping[str, float],
    *,
    cosine: float,
) -> dict[Score, float]:
    found: dict[Score, float] = {}
    for name in settings.score_exponents:
        if name == "agreement":
            found[name] = max(cosine, 0.0)
        elif update.client in accuracies:
            found[name] = accuracies[update.client]
        else:
            raise FederationError(
                f"score_exponents has accuracy, and that of {update.client} was not measured; "
                "leave it out, or name items to ask"
            )
    return found


def _weight(
    update: ClientUpdate, scores: Mapping[Score, float], settings: AggregationSettings
) -> float:
    own = float(update.sequences) if settings.weigh_by == "sequences" else 1.0
    for name, score in scores.items():
        own *= score ** settings.score_exponents[name]
    return own


def _require_enough(
    updates: Sequence[ClientUpdate],
    left_out: Mapping[int, str],
    settings: AggregationSettings,
    num_clients: int,
) -> None:
    least = settings.min_clients or num_clients // 2 + 1
    left = len(updates) - len(left_out)
    if left < least:
        why = "; ".join(f"{updates[place].client}: {why}" for place, why in left_out.items())
        silent = num_clients - len(updates)
        sent = f", {silent} sent nothing" if silent else ""
        raise TooFewUpdates(
            f"{left} of {num_clients} clients are left{sent}, and {least} are needed; {why}".rstrip(
                "; "
            )
        )
