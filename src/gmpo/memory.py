"""Bytes that training a causal language model takes, by arithmetic, and bytes that are free.

Dimensions: **M** hidden size, **F** feed-forward size, **H** query heads, **K** key heads,
**D** head size, **V** vocabulary, **S** prompt tokens, **T** completion tokens.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "GIB",
    "MicroBatchSize",
    "ModelShape",
    "activation_bytes",
    "available_bytes",
    "cache_bytes",
    "head_bytes",
    "largest_micro_batch",
    "resident_bytes",
    "sampling_bytes",
    "weight_bytes",
]

GIB = 2**30

_FLOAT = 4
_HEAD_ROWS = 256
"""Positions whose logits the fast head holds at once."""
_CACHE_STEP = 64
"""Positions by which the sampler's cache grows."""
_PREFILL_TOKENS = 2048
"""Prompt tokens that the sampler runs at once."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a model, and how it is run.

    Attributes:
        num_parameters: weights, tied ones once.
        layers: transformer layers.
        hidden: M.
        feed_forward: F.
        heads: H.
        key_value_heads: K.
        head_size: D.
        vocabulary: V.
        width: bytes of a number in forward and backward passes: 4 in fp32, 2 in bf16.
        is_fast: prompts are run once for their completions, and logits exist in chunks.
    """

    num_parameters: int
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    width: int
    is_fast: bool

    @property
    def key_value_bytes(self) -> int:
        """Of one position's keys and values in one layer."""
        return 2 * self.key_value_heads * self.head_size * self.width


@dataclass(frozen=True, kw_only=True)
class MicroBatchSize:
    """Rows of T completion tokens after prompts of S tokens; lengths are the longest ones."""

    prompts: int
    rows: int
    prompt_tokens: int
    completion_tokens: int


def largest_micro_batch(
    *,
    max_tokens: int,
    group_size: int,
    groups: int,
    prompt_tokens: int,
    completion_tokens: int,
    shares_prompts: bool,
) -> MicroBatchSize:
    """What a step of whole groups is cut into at most, if every completion runs to its limit.

    Args:
        max_tokens: budget of a micro-batch, padding included; one row may exceed it.
        group_size: rows that share a prompt.
        groups: of the step.
        prompt_tokens: of the longest prompt.
        completion_tokens: of the longest completion.
        shares_prompts: whether a prompt counts once for all its rows.
    """

    def prompts_of(rows: int) -> int:
        return -(-rows // group_size) if shares_prompts else rows

    rows = 1
    while rows < groups * group_size:
        more = prompts_of(rows + 1) * prompt_tokens + (rows + 1) * completion_tokens
        if more > max_tokens:
            break
        rows += 1
    return MicroBatchSize(
        prompts=-(-rows // group_size),
        rows=rows,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
    )


def weight_bytes(shape: ModelShape, *, has_reference: bool, keeps_second_gradient: bool) -> int:
    """Weights, gradients and AdamW's two moments in fp32, and what some recipes add.

    Args:
        shape: of the model; below fp32 there is a compute copy of the weights besides.
        has_reference: a frozen copy of the starting model serves a KL term.
        keeps_second_gradient: two gradients are compared.
    """
    compute_copy = shape.width if shape.width < _FLOAT else 0
    per_weight = 4 * _FLOAT + compute_copy
    # The reference holds fp32 weights beside narrower ones too, as every policy does.
    per_weight += _FLOAT + compute_copy if has_reference else 0
    per_weight += _FLOAT if keeps_second_gradient else 0
    return shape.num_parameters * per_weight


def cache_bytes(shape: ModelShape, *, rows: int, positions: int) -> int:
    """Keys and values of all rows that the sampler decodes at once, kept between rounds."""
    capacity = -(-positions // _CACHE_STEP) * _CACHE_STEP
    return rows * capacity * shape.key_value_bytes * shape.layers


def sampling_bytes(shape: ModelShape, *, rows: int, prompt_tokens: int) -> int:
    """What sampling takes for a moment beside the cache: prefilled prompts, and logits.

    Drawing holds four tables of logits in fp32: as they came, joined, shifted, exponentiated.
    """
    prefill = max(_PREFILL_TOKENS, prompt_tokens) * shape.key_value_bytes * shape.layers
    return prefill + 4 * rows * shape.vocabulary * _FLOAT


def activation_bytes(shape: ModelShape, size: MicroBatchSize) -> int:
    """What the layers keep of a micro-batch for its backward pass.

    A token leaves in each layer nine numbers a hidden unit (eight without shared key heads), two of
    them in fp32 because norms are taken in it; four a feed-forward unit; a statistic a head and a
    norm, in fp32. A row keeps keys and values of all that it attends to, and its mask as numbers.
    """
    if not shape.is_fast:
        return _plain_activation_bytes(shape, size)
    later = size.completion_tokens - 1  # the last token predicts nothing
    tokens = size.prompts * size.prompt_tokens + size.rows * later
    seen = size.prompt_tokens + later
    shared = shape.heads // shape.key_value_heads
    mask = shared * (size.rows * later * seen + size.prompt_tokens**2)
    attended = size.rows * seen * (later > 0) + size.prompts * size.prompt_tokens
    return shape.layers * (
        tokens * _token_bytes(shape) + attended * shape.key_value_bytes + mask * shape.width
    )


def head_bytes(shape: ModelShape, size: MicroBatchSize) -> int:
    """What exists beside the layers' activations when they are all there: around the head.

    Fast: the largest of the prompts' keys and values repeated for their rows (end of the forward
    pass), four chunks of logits (the head's forward pass), and five with the head's gradient (its
    backward pass). Plain: logits at every position with their gradient, and six tables at the
    counted ones.
    """
    scored = size.rows * size.completion_tokens
    if not shape.is_fast:
        tokens = size.rows * (size.prompt_tokens + size.completion_tokens)
        return shape.vocabulary * (2 * tokens * shape.width + 6 * scored * _FLOAT)
    chunk = min(_HEAD_ROWS, scored) * shape.vocabulary * _FLOAT
    repeated = size.rows * size.prompt_tokens * shape.key_value_bytes * shape.layers
    gradient = shape.vocabulary * shape.hidden * shape.width
    return max(repeated, 4 * chunk, 5 * chunk + gradient)


def resident_bytes() -> int:
    """Memory of this process now; where the system does not tell, its largest so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes(root: Path = Path("/")) -> int | None:
    """Host memory that this process may still take; None where the system does not say (no Linux).

    The smaller of what Linux calls available and what is left of every control group above this
    process; file pages that a group would give back count as left.

    Args:
        root: where `proc` and `sys` are.
    """
    information = root / "proc" / "meminfo"
    if not information.exists():
        return None
    fields = dict(line.split(":") for line in information.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *_left_in_control_groups(root)])


def _left_in_control_groups(root: Path) -> list[int]:
    """Bytes left in each group that has a limit, for both versions of control groups."""
    left = []
    for line in (root / "proc" / "self" / "cgroup").read_text().splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            base, names = "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        path = Path(place.lstrip("/"))
        # In a container the path may name a group of the host that is not to be seen in here.
        left += [
            found
            for group in (path, *path.parents)
            if (found := _left_in_group(root / base / group, *names)) is not None
        ]
    return left


def _left_in_group(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    if not (folder / limit).exists():
        return None
    allowed = (folder / limit).read_text().strip()
    if allowed == "max":
        return None
    statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    used = int((folder / usage).read_text()) - int(statistics.get(reclaimable, 0))
    return max(0, int(allowed) - used)


def _token_bytes(shape: ModelShape) -> int:
    hidden = 7 if shape.heads > shape.key_value_heads else 6
    return (
        shape.hidden * (hidden * shape.width + 2 * _FLOAT)
        + 4 * shape.feed_forward * shape.width
        + (shape.heads + 2) * _FLOAT
    )


def _plain_activation_bytes(shape: ModelShape, size: MicroBatchSize) -> int:
    """Every row runs its prompt; heads that share keys hold copies; masks are the module's own."""
    tokens = size.rows * (size.prompt_tokens + size.completion_tokens)
    copied = 2 * shape.heads * shape.head_size * shape.width
    return shape.layers * tokens * (_token_bytes(shape) + copied)
