"""A small policy that can add a little: supervised steps on sums, so that reinforcement can begin.

Trained in seconds on one core, it samples right answers in about a third of its completions, as an
instruction-tuned model does on a task that it half knows. Guard and controller are calibrated,
broken and compared on it, because a study of them needs many whole runs.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tests.models import CHARACTERS, SPECIAL, character_tokenizer
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gmpo.config import RunConfig

MAX_OPERAND = 12
_IGNORED = -100


def warm_policy(folder: Path, *, seed: int = 0, steps: int = 400) -> str:
    """Folder of the warmed-up model with its tokenizer; made once, then found."""
    if (folder / "config.json").is_file():
        return str(folder)
    torch.manual_seed(seed)
    tokenizer = character_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(SPECIAL) + len(CHARACTERS),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    model.generation_config.eos_token_id = 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    draw = random.Random(seed)
    for _ in range(steps):
        token_ids, labels = _sums(tokenizer, draw, rows=64)
        logits = model(token_ids).logits[:, :-1]
        loss = functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _sums(
    tokenizer: PreTrainedTokenizerFast, draw: random.Random, *, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of questions with answers, padded, and labels on the answers alone."""
    texts = []
    for _ in range(rows):
        left, right = draw.randint(0, MAX_OPERAND), draw.randint(0, MAX_OPERAND)
        question = [{"role": "user", "content": f"What is {left} + {right}?"}]
        prompt = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        answer = tokenizer(f"{left + right}<end>", add_special_tokens=False)["input_ids"]
        texts.append((prompt, answer))
    width = max(len(prompt) + len(answer) for prompt, answer in texts)
    token_ids = torch.zeros(rows, width, dtype=torch.long)
    labels = torch.full((rows, width), _IGNORED)
    for row, (prompt, answer) in enumerate(texts):
        token_ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return token_ids, labels


def sums_recipe(model: str, **changes: Any) -> RunConfig:
    """Sums for the small policy: 60 rounds of 8 prompts; a change is written `table__key=value`."""
    table: dict[str, Any] = {
        "model": {"name": model, "device": "cpu", "dtype": "fp32"},
        "task": {
            "kind": "arithmetic",
            "max_operand": MAX_OPERAND,
            "held_out_items": 20,
            "instruction": "",
        },
        "sampling": {
            "group_size": 8,
            "prompts_per_round": 8,
            "max_new_tokens": 4,
            "max_length": 48,
        },
        "training": {"rounds": 60, "steps_per_round": 4, "learning_rate": 3e-4},
        "checkpoint": {"every_rounds": 10},
        "evaluation": {"every_rounds": 0, "few_shot": 0},
        "tracking": {"groups_per_round": 0},
    }
    for path, value in changes.items():
        name, _, key = path.partition("__")
        table[name] = value if not key else {**table.get(name, {}), key: value}
    return RunConfig.model_validate(table)
