"""What `GMPOTrainer` cannot train is refused at once, and what goes wrong later is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from tests.models import tiny_model
from tests.python_trainers import ROWS, common_start, settings, trainer

from gmpo import GMPOConfig
from gmpo.errors import ConfigError, DataError, ModelError


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        (
            {"train_dataset": [{"problem": "a"}], "reward": None},
            DataError,
            r"train_dataset\[0\]: answer is missing",
        ),
        ({"train_dataset": []}, DataError, "train_dataset holds no row"),
        (
            {"train_dataset": "openai/gsm8k"},
            DataError,
            r"train_dataset is a str; it must yield rows: .*one split of it",
        ),
        (
            {"train_dataset": DatasetDict({"train": Dataset.from_list(ROWS)})},
            DataError,
            r"train_dataset is a DatasetDict; it must yield rows: .*one split of it",
        ),
        ({"train_dataset": None}, DataError, "train_dataset is a NoneType; it must yield rows"),
        (
            {"train_dataset": [{"text": "a"}]},
            DataError,
            r"train_dataset\[0\]: neither 'prompt' nor 'problem' is there, only \['text'\]; rename "
            "the column that holds the problem$",
        ),
        (
            {"train_dataset": [{"problem": " "}]},
            DataError,
            r"train_dataset\[0\]: a turn or problem is ' '.*; complete the row, or leave it out$",
        ),
        (
            {"train_dataset": ["a"]},
            DataError,
            r"train_dataset\[0\] is str; a row must be a mapping",
        ),
        (
            {"train_dataset": [{"problem": "a"}, {"prompt": [{"role": "user", "content": "b"}]}]},
            DataError,
            r"train_dataset\[1\]: the prompt is a chat, but at train_dataset\[0\] it is a text",
        ),
        (
            {"train_dataset": [{"problem": "a", "id": 1}, {"problem": "b", "id": 1}]},
            DataError,
            r"id '1' was used by train_dataset\[0\]",
        ),
        (
            {"train_dataset": ROWS, "eval_dataset": [{"problem": "a"}], "reward": None},
            DataError,
            r"eval_dataset\[0\]: answer is missing",
        ),
        (
            {
                "eval_dataset": [{"problem": "a"}],
                "config": GMPOConfig(recipe={"evaluation.measure": "accuracy"}),
            },
            DataError,
            r"eval_dataset\[0\]: answer is missing",
        ),
        (
            {"config": GMPOConfig(recipe={"evaluation.measure": "rewards"})},
            ConfigError,
            r"evaluation.measure.*'accuracy' or 'reward'",
        ),
        (
            {"reward": [common_start, common_start]},
            ConfigError,
            r"the rewards are called \['common_start', 'common_start'\]",
        ),
        (
            {"model": tiny_model("llama", dtype=torch.float16)},
            ModelError,
            "the model is in torch.float16; load it in torch.float32 or torch.bfloat16",
        ),
        (
            {"model": tiny_model("llama"), "tokenizer": None},
            ConfigError,
            "the model has no name to find its tokenizer by",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_at_once(
    changes: dict[str, Any], kind: type[Exception], said: str, model: str, tmp_path: Path
):
    with pytest.raises(kind, match=said):
        trainer(model, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_run_without_any_reward_says_so(model: str, tmp_path: Path):
    said: list[str] = []
    ours = trainer(
        model,
        tmp_path / "run",
        reward=lambda completions, **_: [None] * len(completions),
        warn=said.append,
    )
    outcome = ours.train(num_epochs=0.5)
    assert "reward of the last round nan" in str(outcome)
    assert (
        "round 1: none of the 64 rollouts has a reward, so the steps move nothing; each reward "
        "function failed on them or returned None"
    ) in said


def test_ctrl_c_is_passed_on_and_says_how_to_go_on(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)

    def interrupted(**_: Any) -> list[float]:
        raise KeyboardInterrupt

    said: list[str] = []
    ours = trainer(
        model,
        tmp_path,
        config=settings(tmp_path, output_dir=None),
        reward=interrupted,
        warn=said.append,
    )
    with pytest.raises(KeyboardInterrupt):
        ours.train()
    assert said[-1] == (
        "interrupted; runs/gmpo goes on with train(resume=True); in another process with "
        "GMPOConfig(output_dir='runs/gmpo') too"
    )


@pytest.mark.parametrize(
    "lora",
    [{"lora.rank": 4}, {"lora.rank": 2, "lora.alpha": 8.0}, {"lora.rank": 2}, {}],
    ids=["rank", "alpha", "targets", "all weights"],
)
def test_adapters_that_a_model_has_already_are_trained_on_or_others_refused(
    lora: dict[str, Any], model: str, tmp_path: Path
):
    first = {"lora.rank": 2, "lora.targets": ["q_proj"]}
    ours = trainer(model, tmp_path, config=settings(tmp_path / "first", recipe=first))
    ours.train(num_epochs=0.5)
    again = trainer(
        model, tmp_path, model=ours.model, config=settings(tmp_path / "more", recipe=first)
    )
    assert again.train(num_epochs=0.5).checkpoint.name == "round-000001"
    other = trainer(
        model, tmp_path, model=ours.model, config=settings(tmp_path / "other", recipe=lora)
    )
    with pytest.raises(ConfigError, match="the model has adapters of an earlier run already"):
        other.train(num_epochs=0.5)
