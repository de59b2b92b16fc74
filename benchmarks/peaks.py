"""What this machine can do at most: matrix products a second and bytes moved a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from benchmarks.flops import Model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SQUARES = (1024, 2048)
COPY_BYTES = (256 * 2**20, 1024 * 2**20)
"""Of a model's weights, which a large last-level cache may hold, and far beyond one."""
SAMPLE_SECONDS = 0.15
"""A product is repeated for so long; the fastest repetition counts."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """[rows, inner] times a weight of [outer, inner]: `torch.nn.functional.linear`."""

    name: str
    rows: int
    inner: int
    outer: int

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.inner * self.outer


def products(model: Model, *, decoded_rows: int, scored_rows: int) -> list[Product]:
    """Large squares, and the model's own products as decoding and scoring make them."""
    queries = model.query_heads * model.head_size
    own = [
        (kind, rows, inner, outer)
        for rows in (decoded_rows, scored_rows)
        for kind, inner, outer in (
            ("query", model.hidden, queries),
            ("up", model.hidden, model.feed_forward),
            ("down", model.feed_forward, model.hidden),
        )
    ]
    # Chunks of 256 positions are what the update's head makes.
    own += [("head", rows, model.hidden, model.vocabulary) for rows in (decoded_rows, 256)]
    return [Product(name=f"square {n}", rows=n, inner=n, outer=n) for n in SQUARES] + [
        Product(name=f"{kind} {rows} rows", rows=rows, inner=inner, outer=outer)
        for kind, rows, inner, outer in own
    ]


def product_rates(wanted: list[Product], dtype: torch.dtype) -> dict[str, float]:
    """Operations a second of each product, by its fastest repetition."""
    rates = {}
    for product in wanted:
        left = torch.randn(product.rows, product.inner).to(dtype)
        right = torch.randn(product.outer, product.inner).to(dtype)
        seconds = fastest(lambda: functional.linear(left, right))  # noqa: B023 - called at once
        rates[product.name] = product.operations / seconds
    return rates


def copy_rates() -> dict[str, float]:
    """Bytes read plus bytes written a second, of large arrays copied and scaled in place.

    A processor may read what a copy writes before it writes it, a third pass that is not counted.
    Scaling in place has two passes at any rate, as an optimizer's step reads what it writes.
    """
    rates = {}
    for size in COPY_BYTES:
        source = torch.ones(size // 4)
        target = torch.zeros(size // 4)
        name = f"{size // 2**20} MiB"
        rates[name] = 2 * size / fastest(lambda: target.copy_(source))  # noqa: B023
        rates[f"{name} in place"] = 2 * size / fastest(lambda: target.mul_(0.999))  # noqa: B023
    return rates


def fastest(run: Callable[[], object], *, for_seconds: float = SAMPLE_SECONDS) -> float:
    """Seconds of the fastest of at least three calls, after one that is not counted."""
    run()
    best, calls, stop = float("inf"), 0, time.perf_counter() + for_seconds
    while calls < 3 or time.perf_counter() < stop:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
        calls += 1
    return best


def bound_seconds(
    *, operations: float, traffic: float, peak_operations: float, peak_traffic: float
) -> float:
    """Least time of work that must do so many operations and move so many bytes: the larger."""
    return max(operations / peak_operations, traffic / peak_traffic)
