"""`GMPOTrainer` with a tiny model, sums and a reward function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models import character_tokenizer
from transformers import AutoModelForCausalLM

from gmpo import GMPOConfig, GMPOTrainer

ROWS = [
    {"problem": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(4) for b in range(4)
]


def common_start(completions: list[Any], **_: Any) -> list[float]:
    """By TRL's convention: 1 for a completion that starts with a letter or digit."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(text[:1].isalnum()) for text in texts]


def settings(folder: Path, **changes: Any) -> GMPOConfig:
    return GMPOConfig(
        **{
            "learning_rate": 1e-3,
            "batch_size": 16,
            "max_length": 64,
            "max_new_tokens": 4,
            "output_dir": str(folder),
            **changes,
        }
    )


def trainer(llama: str, folder: Path, **changes: Any) -> GMPOTrainer:
    arguments: dict[str, Any] = {
        "model": AutoModelForCausalLM.from_pretrained(llama),
        "tokenizer": character_tokenizer(),
        "config": settings(folder),
        "train_dataset": ROWS,
        "reward": common_start,
        "callbacks": (),
        "warn": lambda _: None,
    }
    return GMPOTrainer(**{**arguments, **changes})
