"""TRL's trainers over the tiny model, and rounds to replay through them."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
from benchmarks.exchange import Scratch, write_start
from benchmarks.trl_side import TrlSetup, TrlSide, keep_rows_in_order
from benchmarks.workloads import Workload
from datasets import Dataset
from scripts.replay import Rounds, random_groups
from tests.models import character_tokenizer, save_tiny, tiny_model
from tests.rollout_groups import VOCABULARY
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOConfig
from trl.trainer import grpo_trainer

# TRL hands transformers an argument by a name that will be renamed.
tolerated = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

# Large enough for ratios from 0.3 to 12 and a few per cent of clipped tokens.
LEARNING_RATES = {"sgd": 0.1, "adamw": 0.01}


@functools.cache
def rounds_of(objective: str, optimizer: str) -> Rounds:
    """Two rounds of 4 groups of 4 in 4 steps each.

    Completions have 1 to 9 tokens, every second one is cut, and a group in 4 is dead.
    """
    groups = random_groups(
        vocabulary=VOCABULARY,
        end_token=1,
        prompt_lengths=[6, 7, 3, 1, 5, 2, 4, 8],
        group_size=4,
        longest=9,
    )
    return Rounds(
        groups=groups,
        prompts_per_round=4,
        objective=objective,
        optimizer=optimizer,
        learning_rate=LEARNING_RATES[optimizer],
    )


def trainer_of(
    kind: type[GRPOTrainer],
    *,
    model: Any = None,
    config: type[GRPOConfig] = GMPOConfig,
    **options: Any,
) -> Any:
    """A trainer on the CPU in fp32, 4 steps a round, rewarding completions that hold digits."""

    def digits(completions: list[str], **_: Any) -> list[float]:
        return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]

    arguments = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 1,
        **options,
    }
    # A trainer makes its folder, though nothing is saved there.
    with tempfile.TemporaryDirectory() as folder:
        trainer = kind(
            model if model is not None else tiny_model(),
            digits,
            args=config(**{"output_dir": folder, **arguments}),
            train_dataset=Dataset.from_dict({"prompt": ["1+1=", "2+2=", "ab", "c"]}),
            processing_class=character_tokenizer(),
        )
    trainer.remove_callback(PrinterCallback)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def trl_side_of_sums(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, max_new_tokens: int
) -> tuple[TrlSide, Workload, Scratch]:
    """The benchmarks' TRL side over a tiny model, which keeps its rows in order."""
    # TRL's own is put back afterwards.
    monkeypatch.setattr(grpo_trainer, "shuffle_sequence_dict", grpo_trainer.shuffle_sequence_dict)
    keep_rows_in_order()
    workload = Workload(
        name="tiny",
        prompts="sums",
        group_size=4,
        prompts_per_round=4,
        max_new_tokens=max_new_tokens,
        model=save_tiny(folder / "model"),
        learning_rate=1e-3,
    )
    scratch = Scratch(folder=folder)
    write_start(workload.model, scratch.start)
    setup = TrlSetup(precision="fp32", rollouts="generate")
    return TrlSide(workload, setup, scratch, str(folder / "trl")), workload, scratch
