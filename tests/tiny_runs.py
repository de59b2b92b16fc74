"""Recipes for runs of a tiny model that end within a second or two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gmpo.config import RunConfig
from gmpo.recipe import dump_recipe
from gmpo.tracking import read_lines

# True of a third of a random character model's completions, so that most groups are alive.
COMMON_START = r"(?s)[0-9a-z].*"


def tiny_recipe(model: str, **changes: Any) -> RunConfig:
    """2 rounds of 4 steps over sums to 4; a change is written `table__key=value`."""
    table: dict[str, Any] = {
        "model": {"name": model, "device": "cpu", "dtype": "fp32"},
        "task": {"kind": "arithmetic", "max_operand": 4, "held_out_items": 5, "instruction": ""},
        "reward": {"weights": {"format": 1.0}, "format_pattern": COMMON_START},
        "sampling": {
            "group_size": 8,
            "prompts_per_round": 8,
            "max_new_tokens": 3,
            "max_length": 64,
        },
        "objective": {},
        "training": {"rounds": 2, "steps_per_round": 4, "learning_rate": 1e-3},
        "checkpoint": {},
        "evaluation": {"every_rounds": 0, "few_shot": 0, "sampled": False},
        "tracking": {"groups_per_round": 8},
    }
    for path, value in changes.items():
        name, _, key = path.partition("__")
        table[name] = value if not key else {**table[name], key: value}
    return RunConfig.model_validate(table)


def kept_in(said: list[str]) -> Callable[[str], None]:
    """Keeps what a run says, but for the note that its rounds are few, as in tiny runs they are."""

    def keep(sentence: str) -> None:
        if not sentence.startswith("guard.mode is "):
            said.append(sentence)

    return keep


def write_recipe(path: Path, config: RunConfig) -> str:
    """The recipe's file, as a user would have it."""
    path.write_text(dump_recipe(config), encoding="utf-8")
    return str(path)


def metric_lines(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl`, of one kind or all."""
    lines = read_lines(folder, "metrics.jsonl")
    return [line for line in lines if kind is None or line["kind"] == kind]


def weights(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "model" / "model.safetensors")


def same_weights(left: Path, right: Path) -> bool:
    """Whether two checkpoints hold the same bits."""
    a, b = weights(left), weights(right)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
