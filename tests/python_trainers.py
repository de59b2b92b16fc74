"""`GMPOTrainer` with a tiny model, sums and a reward function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models import character_tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback

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


class Listener(TrainerCallback):
    """Notes every event, and asks for the end at a step."""

    def __init__(self, end_at: int | None = None) -> None:
        self.events: list[str] = []
        self.logs: list[dict[str, float]] = []
        self.end_at = end_at

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append("begin")
        assert args.learning_rate == 1e-3
        assert kwargs["model"] is not None and kwargs["processing_class"] is not None

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(f"step {state.global_step}/{state.max_steps}")
        if state.global_step == self.end_at:
            control.should_training_stop = True

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(logs)

    def on_save(self, args, state, control, **kwargs):
        self.events.append("save")

    def on_epoch_end(self, args, state, control, **kwargs):
        self.events.append("epoch")

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.events.append(f"evaluate {sorted(metrics)}")

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append("end")


def steps(first: int, last: int) -> list[str]:
    return [f"step {number}/16" for number in range(first, last + 1)]
