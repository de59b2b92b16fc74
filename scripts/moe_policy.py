"""A small mixture-of-experts policy for countdown, warmed up by supervised steps.

The model is a Qwen3-MoE of a few million parameters with eight experts, one of them active, as in
the paper's countdown experiment. Its tokenizer knows the task's words, each number being one. It
learns the form of an answer, and some skill, from worked examples that the reinforcement run never
asks; then the folder is an ordinary model for any recipe.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from scripts.arithmetic import of_this_process
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from gmpo.records import Prompt
from gmpo.task_config import CountdownTask
from gmpo.tasks.countdown import countdown_task

__all__ = ["WarmUp", "countdown_tokenizer", "warmed_up_policy"]

RULES = "Use each number exactly once, with +, -, * and /."
WORDS = ("Make", "from", "and", ",", ".", "\n", "+", "-", "*", "/", "(", ")")
SPECIAL = ("<pad>", "<end>", "<unknown>")
NOT_A_TARGET = -100
BALANCE = 0.01
"""Weight of the load-balancing term in the warm-up; the reinforcement runs have none."""


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """The model's size and its supervised steps; the same values give the same weights."""

    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    experts: int = 8
    active_experts: int = 1
    expert_size: int = 384
    steps: int = 800
    batch_size: int = 128
    learning_rate: float = 2e-3
    examples: int = 12_000
    seed: int = 0


def countdown_tokenizer(largest_number: int) -> PreTrainedTokenizerFast:
    """One token a number, operator, bracket or word; the task's constant sentence is one too."""
    words = [*SPECIAL, *WORDS, *map(str, range(largest_number + 1))]
    backend = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\d+|[A-Za-z]+|[^\sA-Za-z\d]|\n"), behavior="removed", invert=True
    )
    backend.add_tokens([AddedToken(RULES, lstrip=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
    )


def warmed_up_policy(task: CountdownTask, warm_up: WarmUp, *, cache: Path) -> Path:
    """Folder of the warmed-up model with its tokenizer, made unless `cache` has it.

    Args:
        task: that will be trained on; none of its items is an example.
        warm_up: size and supervised steps.
        cache: folder whose subfolders are named by a digest of both, of torch's version and of the
            arithmetic.
    """
    made_of = {
        "task": task.model_dump(),
        "warm_up": asdict(warm_up),
        "torch": torch.__version__,
        "arithmetic": of_this_process(),
    }
    text = json.dumps(made_of, sort_keys=True, indent=1)
    folder = cache / f"policy-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"
    if folder.is_dir():
        return folder
    tokenizer = countdown_tokenizer(max(task.max_number, task.max_target))
    model = _fresh_model(warm_up, tokenizer)
    _supervise(model, *_examples(task, warm_up, tokenizer), warm_up)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "warm_up.json").write_text(text + "\n")
    partial.rename(folder)
    return folder


def _fresh_model(warm_up: WarmUp, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    torch.manual_seed(warm_up.seed)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=warm_up.hidden_size,
            num_hidden_layers=warm_up.layers,
            num_attention_heads=warm_up.heads,
            num_key_value_heads=warm_up.heads,
            head_dim=warm_up.hidden_size // warm_up.heads,
            num_experts=warm_up.experts,
            num_experts_per_tok=warm_up.active_experts,
            moe_intermediate_size=warm_up.expert_size,
            # With one expert active, normalised weights would be 1 and teach the router nothing.
            norm_topk_prob=False,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    return model


def _examples(
    task: CountdownTask, warm_up: WarmUp, tokenizer: PreTrainedTokenizerFast
) -> tuple[Tensor, Tensor]:
    """Token ids and targets [N, T] of solved items that the run neither trains on nor holds out."""
    settings = task.model_dump(exclude={"kind"})
    own = countdown_task(**settings)
    others = countdown_task(
        **settings
        | {"train_items": warm_up.examples, "held_out_items": 0, "split_seed": _other_split(task)}
    )
    taken = {prompt.columns["key"] for prompt in (*own.train, *own.held_out)}
    solved = [prompt for prompt in others.train if prompt.columns["key"] not in taken]
    return _padded([_tokens(prompt, tokenizer) for prompt in solved], tokenizer.pad_token_id)


def _other_split(task: CountdownTask) -> int:
    return task.split_seed + 1_000_003


def _tokens(prompt: Prompt, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Of the prompt as the sampler renders it, and of its solution with the end token."""
    assert prompt.messages is not None
    asked = tokenizer(prompt.messages[0].content + "\n")["input_ids"]
    solved = tokenizer(prompt.columns["answer"])["input_ids"]
    return asked, [*solved, tokenizer.eos_token_id]


def _padded(pairs: Sequence[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(len(asked) + len(solved) for asked, solved in pairs)
    token_ids = torch.full((len(pairs), width), pad)
    targets = torch.full((len(pairs), width), NOT_A_TARGET)
    for row, (asked, solved) in enumerate(pairs):
        end = len(asked) + len(solved)
        token_ids[row, :end] = torch.tensor(asked + solved)
        targets[row, len(asked) : end] = torch.tensor(solved)
    return token_ids, targets


def _supervise(
    model: Qwen3MoeForCausalLM, token_ids: Tensor, targets: Tensor, warm_up: WarmUp
) -> None:
    """Cross-entropy of the solutions, with the balance term that keeps all experts in use."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=warm_up.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=warm_up.learning_rate, total_steps=warm_up.steps, pct_start=0.05
    )
    order = random.Random(warm_up.seed)
    for _ in range(warm_up.steps):
        rows = torch.tensor(order.sample(range(len(token_ids)), warm_up.batch_size))
        ids = token_ids[rows]
        output = model(
            ids,
            attention_mask=(ids != model.config.pad_token_id).long(),
            use_cache=False,
            output_router_logits=True,
        )
        loss = functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1),
            targets[rows][:, 1:].flatten(),
            ignore_index=NOT_A_TARGET,
        )
        (loss + BALANCE * output.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
