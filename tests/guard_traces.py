"""Metrics of made-up runs for the guard: one that learns, and one that has learned what it can."""

from __future__ import annotations

import numpy as np

Metrics = dict[str, float | None]


def healthy(seed: int = 0, *, rounds: int = 60) -> list[Metrics]:
    """A run that learns: reward rises, entropy falls, and all scatters as in small runs."""
    chance = np.random.default_rng(seed)
    trace: list[Metrics] = []
    for number in range(rounds):
        done = number / rounds
        trace.append(
            {
                "rollout/reward": float(np.clip(0.2 + 0.7 * done + chance.normal(0, 0.08), 0, 1)),
                "rollout/entropy": float(np.exp(-1.5 * done + chance.normal(0, 0.15))),
                "rollout/completion_tokens": float(5 + chance.normal(0, 0.2)),
                "rollout/tokens": 320.0,
                "rollout/groups": 8.0,
                "rollout/dead_groups": float(chance.integers(0, 5)),
                "rollout/errors_total": 0.0,
                "rollout/mismatch_mean": float(np.exp(chance.normal(-15, 0.6))),
                "update/gradient_norm": float(np.exp(chance.normal(0, 0.4))),
                "ratio/am_gm_gap": float(np.exp(chance.normal(-6, 1.2))),
            }
        )
    return trace


def steady(seed: int, *, rounds: int = 60) -> list[Metrics]:
    """A run that has learned what it can."""
    chance = np.random.default_rng(seed)
    flat = {"rollout/entropy": 0.4, "rollout/groups": 8.0, "rollout/dead_groups": 1.0}
    return [
        flat
        | {
            "rollout/reward": float(chance.normal(0.6, 0.08)),
            "ratio/am_gm_gap": float(np.exp(chance.normal(-6.5, 1.0))),
        }
        for _ in range(rounds)
    ]
