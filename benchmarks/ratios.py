"""Arithmetic of a comparison: what pairs of rounds say, and when they may be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

Pair = Mapping[str, Mapping[str, Any]]
"""Figures of one round of "trl", one of "gmpo", and gmpo's "replay" of TRL's.

Where TRL in fp32 had to be asked, also "exact": the replay's agreement with that.
"""

RATIOS = ("round_ratio", "rollout_ratio", "update_ratio")
ENOUGH_PAIRS = 5
"""Medians of fewer pairs of rounds are marked: those of one workload may differ by half."""
STAGES = "TRL's pass over old log-probabilities counts as update"
"""How rounds are cut into stages, as results files say it: a rollout is what draws completions, and
a round's update is all of it but rollout and rewards. Files without this line were timed by an
older rule, under which that pass of TRL counted as rollout."""
PEAKS = "without what is kept to compare gradients"
"""Which memory a peak is of. In those of files without this line are up to four bytes a weight that
the comparison kept: of TRL's gradients, and of gmpo's where its own steps keep none in fp32."""


class UpdatesDiffer(RuntimeError):
    """The two sides did not do the same work, so their times say nothing."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How far updates may be apart: |d_gmpo - d_trl| / |d_trl| at most, and cosine at least.

    The gradient of a round's first step has to agree in every round: the weights are the same
    there, and no ratio is clipped yet.
    """

    gradient_cosine: float
    sgd_difference: float
    sgd_cosine: float | None
    adamw_difference: float
    adamw_cosine: float | None


FP32_BOUNDS = Bounds(
    gradient_cosine=0.9999,
    # Parity's 1e-4 (scripts/parity.py) is of short completions; sums over the tokens of `words`
    # round by 1.07e-4.
    sgd_difference=2e-4,
    sgd_cosine=None,
    adamw_difference=1e-2,
    adamw_cosine=None,
)
BF16_BOUNDS = Bounds(
    gradient_cosine=0.99,
    # A cosine sees no length. At its bound a difference is 0.14 (SGD) or 0.31 (AdamW) between
    # updates of one length; of one twice as long it is 1 at least.
    sgd_difference=0.2,
    sgd_cosine=0.99,
    adamw_difference=0.5,
    # AdamW's first steps give weights with hardly a gradient the same size as others, and their
    # sign is rounding: docs/decisions/0011-bounds-on-bf16-updates.md.
    adamw_cosine=0.95,
)


OWN_COSINE = 0.71
"""Least cosine of a TRL setting's AdamW update to TRL's in fp32, where gmpo's is another one. Its
square is the share of the update's squared length that lies along the exact one: half. 0.83 was
seen where rounding alone led away, 0.17 of weights in bf16, in which the steps vanish."""


def bounds_of(*, both_fp32: bool) -> Bounds:
    return FP32_BOUNDS if both_fp32 else BF16_BOUNDS


def complaint(compared: Mapping[str, float], optimizer: str, bounds: Bounds) -> str | None:
    """Why these updates are not the same work, or None.

    Args:
        compared: "difference" and "cosine" of gmpo's update to TRL's, and "gradient_cosine" of
            the first gradients.
        optimizer: that made them, "sgd" or "adamw".
        bounds: of the precision.
    """
    most, least = difference_and_cosine(optimizer, bounds)
    # Negated, so that NaN complains.
    if not compared["gradient_cosine"] >= bounds.gradient_cosine:
        return (
            f"{optimizer}: the cosine between gmpo's and TRL's first gradient is "
            f"{compared['gradient_cosine']:.4f}, at least {bounds.gradient_cosine:g} is needed"
        )
    if least is not None and not compared["cosine"] >= least:
        return (
            f"{optimizer}: the cosine between gmpo's and TRL's update is "
            f"{compared['cosine']:.4f}, at least {least:g} is needed"
        )
    if not compared["difference"] <= most:
        return (
            f"{optimizer}: |d_gmpo - d_trl| / |d_trl| is {compared['difference']:.3g}, "
            f"at most {most:g} is allowed"
        )
    return None


def difference_and_cosine(optimizer: str, bounds: Bounds) -> tuple[float, float | None]:
    """The largest difference and the smallest cosine of "sgd"'s or "adamw"'s updates."""
    if optimizer == "sgd":
        return bounds.sgd_difference, bounds.sgd_cosine
    return bounds.adamw_difference, bounds.adamw_cosine


def is_left_to_fp32(compared: Mapping[str, float], optimizer: str, bounds: Bounds) -> bool:
    """Whether rounded updates may miss their bounds though the first gradients agree.

    An update in fp32 tells then which of the two rounding led away.
    """
    _, least = difference_and_cosine(optimizer, bounds)
    return least is not None and compared["gradient_cosine"] >= bounds.gradient_cosine


def require_same_update(compared: Mapping[str, float], optimizer: str, bounds: Bounds) -> None:
    """Refuse to go on where the sides moved the weights differently.

    Raises:
        UpdatesDiffer: a bound is missed; figure and bound are in the message.
    """
    reason = complaint(compared, optimizer, bounds)
    if reason is not None:
        raise UpdatesDiffer(
            f"gmpo and TRL moved the weights differently on the same completions: {reason}; their "
            "times are not compared"
        )


def own_complaint(theirs: Mapping[str, float], bounds: Bounds) -> str | None:
    """Why TRL's round is not the update that TRL makes in fp32, or None.

    Args:
        theirs: "cosine" of its AdamW update to the one in fp32 on the same completions, and
            "gradient_cosine" of the first gradients.
        bounds: of the precision.
    """
    least = {"gradient_cosine": bounds.gradient_cosine, "cosine": OWN_COSINE}
    words = {"gradient_cosine": "first gradient", "cosine": "update"}
    for name, bound in least.items():
        if not theirs[name] >= bound:
            return (
                f"the cosine between its {words[name]} and that of TRL in fp32 is "
                f"{theirs[name]:.4f}, at least {bound:g} is needed"
            )
    return None


def ratios_of(pair: Pair) -> dict[str, float]:
    """TRL's time over gmpo's: of own rounds, of a sampled token, and of one and the same update."""
    trl, gmpo = pair["trl"], pair["gmpo"]
    return {
        "round_ratio": trl["round_seconds"] / gmpo["round_seconds"],
        "rollout_ratio": tokens_per_second(gmpo) / tokens_per_second(trl),
        "update_ratio": trl["update_seconds"] / pair["replay"]["update_seconds"],
    }


def tokens_per_second(figures: Mapping[str, Any]) -> float:
    return float(figures["tokens"] / figures["rollout_seconds"])


def summary(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Medians with min and max over pairs, and what else belongs beside them."""
    ratios = [ratios_of(pair) for pair in pairs]
    figures: dict[str, Any] = {"num_pairs": len(pairs)}
    for name in RATIOS:
        values = [each[name] for each in ratios]
        figures |= {f"{name}_median": median(values), **extremes(name, values)}
    memory = [pair["gmpo"]["peak_gib"] / pair["trl"]["peak_gib"] for pair in pairs]
    figures |= {
        "memory_ratio": median(memory),
        **extremes("memory_ratio", memory),
        "live_share": {side: mean(p[side]["live_share"] for p in pairs) for side in SIDES},
    }
    for side in SIDES:
        figures[side] = figures_of_side([side_of(pair, side) for pair in pairs])
    return figures | agreement(pairs)


def extremes(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}_min": min(values), f"{name}_max": max(values)}


def side_of(pair: Pair, side: str) -> dict[str, float]:
    """A side's figures of a pair; updates are of the same rows, so gmpo's is its replay's."""
    updated = pair["trl" if side == "trl" else "replay"]
    return {
        "round_seconds": pair[side]["round_seconds"],
        "rollout_tokens_per_second": tokens_per_second(pair[side]),
        "update_seconds": updated["update_seconds"],
        "peak_gib": pair[side]["peak_gib"],
    }


def figures_of_side(of_pairs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each figure's median, by its own name, with min and max."""
    found: dict[str, float] = {}
    for name in of_pairs[0]:
        values = [each[name] for each in of_pairs]
        found |= {name: median(values), **extremes(name, values)}
    return found


def agreement(pairs: Sequence[Pair]) -> dict[str, Any]:
    """How far gmpo's updates were from TRL's at most, and which pairs TRL in fp32 was asked about.

    Those are numbered from 1, in the order of the pairs.
    """
    replays = [pair["replay"] for pair in pairs]
    figures: dict[str, Any] = {
        "largest_difference": max(each["difference"] for each in replays),
        "smallest_cosine": min(each["cosine"] for each in replays),
        "smallest_gradient_cosine": min(each["gradient_cosine"] for each in replays),
    }
    exact = {number: pair["exact"] for number, pair in enumerate(pairs, 1) if "exact" in pair}
    if exact:
        figures["left_to_fp32"] = {
            "num_pairs": len(exact),
            "pairs": list(exact),
            "smallest_cosine": min(each["cosine"] for each in exact.values()),
            "trl_smallest_cosine": min(each["trl_cosine"] for each in exact.values()),
        }
    return figures


SIDES = ("trl", "gmpo")
