"""Decoding steps over fixed buffers, which a GPU replays as captured graphs.

A step of a small model is a thousand small kernels, and starting them takes the host many times as
long as the GPU needs to run them. A CUDA graph starts all at once, but it does the very work that
it was captured with: the same memory and shapes. So `fixed_step` is a function of buffers that stay
where they are, and comes in few shapes: rows and positions are rounded up to powers of two. It runs
uncaptured anywhere; only `cuda_capture` is CUDA's.

Rows beyond the running ones follow no prompt, and write to their own first place in the cache,
which whoever gets the row writes anew. Their logits are cut off.

A shape's first step runs as it is, which readies the libraries; its second is captured. Weights
that are loaded in place are read by the next replay. Where a buffer or a weight lies elsewhere,
graphs are captured anew.

Dimensions: **R** rows, **V** vocabulary.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from gmpo.policy.llama import LlamaBody
from gmpo.sampler.attention import attention_of_fixed_rows, walks_fixed_rows
from gmpo.sampler.cache import FixedRows, RowPlan, power_of_two
from gmpo.sampler.forward import step_logits
from gmpo.sampler.prepared import PreparedBody

__all__ = ["Capture", "FixedSteps", "Step", "capture_for", "cuda_capture", "fixed_step"]

_LEAST_POSITIONS = 64
"""Shapes of fewer positions would only be more shapes."""
_MOST_SHAPES = 64
"""Shapes whose graphs are kept; those not used for longest go first. One holds its logits and a few
MB of kernel arguments."""

Step = Callable[[FixedRows], Tensor]
Capture = Callable[[Step, FixedRows], Callable[[], Tensor]]
"""What makes a step over these buffers repeatable; the repetition reads what the buffers hold then,
and writes its logits where it wrote them before."""


def fixed_step(body: LlamaBody, linear: PreparedBody, rows: FixedRows) -> Float[Tensor, "R V"]:
    """Logits of each row's next token; nothing but the tensors of `rows` decides them.

    The new tokens' keys and values are written into `rows.own`.
    """
    return step_logits(body, linear, rows.token_ids, attention_of_fixed_rows(body, rows))


def capture_for(device: torch.device) -> Capture | None:
    """What captures steps on a device; None where they are not captured."""
    return cuda_capture() if device.type == "cuda" else None


def cuda_capture() -> Capture:
    """Capture as CUDA graphs that share one pool of memory: they never run at once."""
    pool = torch.cuda.graph_pool_handle()
    kept: list[torch.cuda.CUDAGraph] = []

    def captured(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile, e.g. to load another model.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = run()
        return graph, result

    def capture(step: Step, rows: FixedRows) -> Callable[[], Tensor]:
        if not kept:  # a pool is gone with the last graph of it
            kept.append(captured(lambda: torch.zeros(1, device=rows.table.device))[0])
        graph, logits = captured(lambda: step(rows))

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay

    return capture


@dataclass
class _Shape:
    """One shape's buffers, and what repeats its step once it is captured."""

    rows: FixedRows
    has_run: bool = False
    replay: Callable[[], Tensor] | None = None


class FixedSteps:
    """Steps of one decoder's rows, captured by shape.

    Args:
        body: the model.
        linear: its linear layers, as modules that follow the weights.
        capture: makes a step repeatable.
    """

    def __init__(self, body: LlamaBody, linear: PreparedBody, *, capture: Capture) -> None:
        self._body = body
        self._step = partial(fixed_step, body, linear)
        self._capture = capture
        self._shapes: OrderedDict[tuple[int, int, int], _Shape] = OrderedDict()
        self._parts: tuple[Tensor, Tensor] | None = None
        self._weights: list[int] = []
        self._is_same_model = False

    def weights_may_move(self) -> None:
        """Look again, before the next step, where the weights lie; no row runs."""
        self._is_same_model = False

    def logits(self, token_ids: Int[Tensor, " R"], plan: RowPlan) -> Float[Tensor, "R V"]:
        """Logits of the rows' next tokens, valid until the next step.

        Raises:
            RuntimeError: the device would not capture; the step can be taken by other means.
        """
        shape, count = self._shape_of(plan), len(token_ids)
        table = shape.rows.table
        table[1:] = functional.pad(plan.table, (0, table.shape[1] - count))
        table[0, :count] = token_ids
        if shape.has_run and shape.replay is None:
            shape.replay = self._capture(self._step, shape.rows)
        shape.has_run = True
        logits = self._step(shape.rows) if shape.replay is None else shape.replay()
        return logits[:count]

    def _shape_of(self, plan: RowPlan) -> _Shape:
        """The step's buffers, new ones where the cache or a weight lies elsewhere than before."""
        if not self._is_same_model:
            self._compare_weights()
        parts = plan.prompts, plan.own
        if self._parts is None or any(map(operator.is_not, parts, self._parts)):
            self._shapes.clear()
            self._parts = parts
        sizes = _sizes(plan, walks=walks_fixed_rows(self._body, plan.own))
        shape = self._shapes.pop(sizes, None) or _new_shape(plan, *sizes)
        self._shapes[sizes] = shape  # the last used is the last
        if len(self._shapes) > _MOST_SHAPES:
            self._shapes.popitem(last=False)
        return shape

    def _compare_weights(self) -> None:
        weights = [weight.data_ptr() for weight in self._body.model.parameters()]
        if weights != self._weights:
            self._shapes.clear()
        self._weights, self._is_same_model = weights, True


def _sizes(plan: RowPlan, *, walks: bool) -> tuple[int, int, int]:
    """Rows, and positions of the prompts' part and the own one, rounded up.

    Attention that walks each row's positions leaves out the others by itself.
    """
    if walks:
        return power_of_two(plan.table.shape[1]), plan.prompts.shape[4], plan.own.shape[4]
    _, prompt_length, own_length = plan.table.amax(dim=1).tolist()
    prompts, own = (power_of_two(max(n, _LEAST_POSITIONS)) for n in (prompt_length, own_length + 1))
    rows = power_of_two(plan.table.shape[1])
    return rows, min(prompts, plan.prompts.shape[4]), min(own, plan.own.shape[4])


def _new_shape(plan: RowPlan, rows: int, prompt_positions: int, own_positions: int) -> _Shape:
    assert rows <= plan.own.shape[2], "the cache has no row for each row of the shape"
    return _Shape(
        rows=FixedRows(
            prompts=plan.prompts,
            own=plan.own,
            table=torch.zeros(4, rows, dtype=torch.long, device=plan.own.device),
            prompt_positions=prompt_positions,
            own_positions=own_positions,
        )
    )
