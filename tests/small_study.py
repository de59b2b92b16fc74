"""The stability study, cut small enough for a test."""

from __future__ import annotations

from typing import Any

from scripts.moe_policy import WarmUp
from scripts.stability_study import Study

from gmpo.task_config import CountdownTask

__all__ = ["CUT", "numbers"]

CUT = Study(
    warm_up=WarmUp(
        hidden_size=32, layers=1, expert_size=32, steps=300, batch_size=64, examples=100
    ),
    task=CountdownTask(
        kind="countdown",
        num_numbers=2,
        max_number=12,
        train_items=60,
        held_out_items=10,
        instruction="",
    ),
    rounds=3,
    prompts_per_round=8,
    group_size=4,
)
"""Two numbers, so that a model of one layer earns a reward after 300 supervised steps."""


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("policy", "ended", "figures", "curves", "log_digest")}
