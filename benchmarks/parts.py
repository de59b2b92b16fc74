"""Where the time of a decoding step or an update goes, by the part of the work.

torch's profiler gives each operator's own time with the sizes of its inputs, and a part is told by
operator and size: that needs nothing inside the measured code, so it stays right when that changes,
but an operator no rule names is counted as "norms and elementwise". Products over panels are
compiled functions, which the profiler sees where `panels_named` gives them names.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from gmpo.policy.head import TOKENS_PER_TILE
from gmpo.sampler import prepared

PARTS = (
    "projections",
    "attention",
    "head",
    "drawing",
    "softmax over the vocabulary",
    "optimizer",
    "norms and elementwise",
)
OVERHEAD = "compiled functions, python and dispatch"

_PRODUCTS = (
    "mm",
    "addmm",
    "addmm_",
    "linear",
    "mkldnn_linear",
    "_mkldnn_linear",
    "mkldnn::_linear_pointwise",
)
_PANELS, _PANELS_OF_HEAD = "panel_linear", "panel_linear, head"
_DRAWING = (
    "cumsum",
    "searchsorted",
    "nextafter",
    "argmax",
    "logsumexp",
    "sort",
    "multinomial",
    "topk",
)
_OWN = {
    "_Attend": "attention",
    "_ChunkedTokenLogprobs": "softmax over the vocabulary",
    _PANELS: "projections",
    _PANELS_OF_HEAD: "head",
}
"""Passes of gmpo's own that are not norms and elementwise; compiled functions run in their time."""
_CACHE = ("index_put_", "_index_put_impl_", "baddbmm", "bmm")


@dataclass(frozen=True, kw_only=True)
class Operator:
    """An operator's own seconds in all calls with inputs of the same sizes."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    seconds: float


@contextlib.contextmanager
def panels_named(vocabulary: int) -> Iterator[None]:
    """Weights laid out inside show their products to the profiler, as torch's operators do."""
    right = prepared.panel_linear

    def named(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        run = right(weight, bias)
        name = _PANELS_OF_HEAD if len(weight) == vocabulary else _PANELS

        def recorded(inputs: Tensor) -> Tensor:
            with record_function(name):
                return run(inputs)

        return recorded

    prepared.panel_linear = named
    try:
        yield
    finally:
        prepared.panel_linear = right


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A run's operators, and its seconds from beginning to end, both under the profiler."""

    operators: tuple[Operator, ...]
    seconds: float


def profiled(run: Callable[[], object]) -> Profile:
    """Own seconds of each operator that `run` calls, on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    operators = tuple(
        Operator(
            name=event.key.removeprefix("aten::"),
            shapes=tuple(tuple(shape) for shape in event.input_shapes if shape),
            seconds=event.self_cpu_time_total / 1e6,
        )
        for event in recorded.key_averages(group_by_input_shape=True)
    )
    return Profile(operators=operators, seconds=seconds)


def part_of(operator: Operator, *, vocabulary: int, draws: bool) -> str:
    """The part that an operator belongs to.

    Args:
        operator: with the sizes of its inputs.
        vocabulary: a size that only the head and what follows it have.
        draws: whether tokens are drawn, so that passes over the vocabulary are drawing.
    """
    name = operator.name
    own = _OWN.get(name.removesuffix("Backward"))
    if own is not None:
        return own
    # A full table of logits, or one of the tiles in which training makes them.
    is_wide = any({vocabulary, TOKENS_PER_TILE} & set(shape) for shape in operator.shapes)
    if name in _PRODUCTS:
        return "head" if is_wide else "projections"
    if "scaled_dot_product" in name or name in _CACHE:
        return "attention"
    if "adam" in name or name.startswith(("_foreach", "Optimizer")):
        return "optimizer"
    if name in _DRAWING:
        return "drawing" if draws else "softmax over the vocabulary"
    # A row of the embedding is read or its gradient written; its table has the vocabulary's size.
    if is_wide and not name.startswith("embedding") and name not in ("index_select", "zero_"):
        return "drawing" if draws else "softmax over the vocabulary"
    return "norms and elementwise"


def shares(
    of: Profile, *, seconds: float, vocabulary: int, draws: bool
) -> dict[str, dict[str, float]]:
    """Each part's share of the profiled run, and as much of `seconds`, those without the profiler.

    Shares are of the profiled run's own seconds, because one run may fall into a slower moment of
    the machine than those that were timed.

    A compiled function counts as the pass of autograd that calls it. What is not accounted for is
    Python, dispatch, and compiled functions that no pass of autograd calls, as in decoding (but for
    the products that `panels_named` names): the profiler does not see them. What it takes itself,
    some microseconds an operator, lies there too.
    """
    totals: dict[str, float] = defaultdict(float)
    for operator in of.operators:
        totals[part_of(operator, vocabulary=vocabulary, draws=draws)] += operator.seconds
    totals[OVERHEAD] = of.seconds - sum(totals.values())
    found = {part: totals[part] / of.seconds for part in (*PARTS, OVERHEAD) if part in totals}
    return {part: {"seconds": share * seconds, "share": share} for part, share in found.items()}


def parts_table(
    title: str, parts: Mapping[str, Mapping[str, float]], bounds: Mapping[str, float]
) -> str:
    """As a Markdown table in milliseconds, with the bound of the parts that have one."""
    lines = [f"| {title} | ms | share | bound, ms |", "|---|---|---|---|"]
    for name, of_part in sorted(parts.items(), key=lambda item: -item[1]["seconds"]):
        bound = f"{1e3 * bounds[name]:.1f}" if name in bounds else ""
        seconds, share = 1e3 * of_part["seconds"], of_part["share"]
        lines.append(f"| {name} | {seconds:.1f} | {share:.0%} | {bound} |")
    return "\n".join(lines)
