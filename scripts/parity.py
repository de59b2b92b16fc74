"""How far TRL's update and gmpo's are apart on the same rounds, for a tiny and a real model.

Prints a table and writes every figure to a JSON file, which docs/experiments.md quotes. Run it from
the repository's root, where the tiny model of the tests is found too:

    python -m scripts.parity --json docs/results/parity.json
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.options import ends_clearly, results_file
from benchmarks.results import write_results
from scripts.replay import (
    LIMITS,
    STEPS_PER_ROUND,
    Rounds,
    advantages_of,
    norm,
    random_groups,
    relative_difference,
    rewarded_groups,
    through_gmpo,
    through_trl,
)
from tests.models import character_tokenizer, tiny_model
from tests.rollout_groups import VOCABULARY
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmpo.objective import OBJECTIVES, ObjectiveTerms
from gmpo.policy.load import load_model, load_tokenizer
from gmpo.records import Group

BEGINNINGS = (
    "The capital of France is",
    "My favourite animal is",
    "Once upon a time",
    "A recipe for bread needs",
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """An optimizer with a step size that leaves the clip on both sides."""

    optimizer: str
    learning_rate: float
    limit: float
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, groups to replay over it, and the settings to compare."""

    load: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    groups: tuple[Group, ...]
    settings: tuple[Setting, ...]


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=["tiny", "smollm2-135m"])
    parser.add_argument(
        "--json", type=results_file, metavar="FILE", help="write every figure here too"
    )
    arguments = parser.parse_args(argv)
    subjects = {"tiny": tiny, "smollm2-135m": smollm2}
    rows: list[dict[str, Any]] = []
    for name in arguments.models or subjects:
        for row in compare(name, subjects[name]()):
            rows.append(row)
            if arguments.json:
                write(arguments.json, rows)
    return int(not all(row["agrees"] for row in rows))


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """After every row: the real model's take minutes each."""
    file.parent.mkdir(parents=True, exist_ok=True)
    report = {"made_with": made_with(), "comparisons": rows}
    write_results(file, report)


def tiny() -> Subject:
    """A random Llama of two layers, two rounds."""
    return Subject(
        load=tiny_model,
        tokenizer=character_tokenizer(),
        groups=random_groups(
            vocabulary=VOCABULARY,
            end_token=1,
            prompt_lengths=[6, 7, 3, 1, 5, 2, 4, 8],
            group_size=4,
            longest=9,
        ),
        settings=(
            Setting(optimizer="sgd", learning_rate=0.1, limit=LIMITS["sgd"]),
            Setting(optimizer="adamw", learning_rate=0.01, limit=LIMITS["adamw"]),
        ),
    )


def smollm2() -> Subject:
    """The default model, one round of completions that it draws itself.

    In fp32 a step adds a rounded number to each of 135 million weights, and where two sums differ
    in their last place, some weights land one place apart. That weighs less the larger the step is;
    a large one in turn carries an early difference further. So there are three step sizes, a wide
    limit for the smallest that catches a wrong objective and no more, and fp64 besides.
    """
    tokenizer = load_tokenizer("smollm2-135m")

    def load() -> PreTrainedModel:
        return load_model("smollm2-135m", device="cpu", dtype="fp32")

    return Subject(
        load=load,
        tokenizer=tokenizer,
        groups=drawn_groups(load(), tokenizer),
        settings=(
            Setting(optimizer="sgd", learning_rate=2e-3, limit=10 * LIMITS["sgd"]),
            Setting(optimizer="sgd", learning_rate=1e-2, limit=LIMITS["sgd"]),
            Setting(optimizer="sgd", learning_rate=2e-2, limit=LIMITS["sgd"]),
            Setting(optimizer="adamw", learning_rate=2e-5, limit=LIMITS["adamw"]),
            Setting(optimizer="sgd", learning_rate=1e-2, limit=LIMITS["sgd"], dtype=torch.float64),
        ),
    )


def drawn_groups(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[Group, ...]:
    """4 completions of at most 12 tokens for each beginning, all different by their openness."""
    torch.manual_seed(0)
    prompts, completions = [], []
    for beginning in BEGINNINGS:
        prompt = tokenizer(beginning, return_tensors="pt")
        drawn = model.generate(
            **prompt, do_sample=True, top_k=0, max_new_tokens=12, num_return_sequences=4
        )
        ended = [row[prompt.input_ids.shape[1] :].numpy() for row in drawn]
        prompts.append(prompt.input_ids[0].numpy())
        completions.append([without_padding(ids, tokenizer.eos_token_id) for ids in ended])
    return rewarded_groups(prompts, completions)


def without_padding(ids: np.ndarray, end_token: int) -> np.ndarray:
    """Up to the first end token, which stays."""
    ends = np.flatnonzero(ids == end_token)
    return ids[: ends[0] + 1] if len(ends) else ids


def compare(name: str, subject: Subject) -> Iterator[dict[str, Any]]:
    """One row for each setting and objective."""
    for setting in subject.settings:
        for objective in ("gmpo", "grpo"):
            rounds = Rounds(
                groups=subject.groups,
                prompts_per_round=4,
                objective=objective,
                optimizer=setting.optimizer,
                learning_rate=setting.learning_rate,
            )
            row = {"model": name, **compare_rounds(subject, rounds, setting)}
            print(
                f"{name:13} {objective} {setting.optimizer:5} {row['dtype']:7} "
                f"step {setting.learning_rate:.0e}: "
                f"|d_gmpo - d_trl| / |d_trl| = {row['difference']:.2e} "
                f"(at most {row['limit']:.0e}); "
                f"sign flipped {row['difference_sign_flipped']:.2f}; |d| {row['update_norm']:.3g}; "
                f"ratio {row['ratio_min']:.3f} to {row['ratio_max']:.3f}, "
                f"clipped {row['clipped_fraction']:.1%}",
                flush=True,
            )
            yield row


def compare_rounds(subject: Subject, rounds: Rounds, setting: Setting) -> dict[str, Any]:
    def load() -> PreTrainedModel:
        return subject.load().to(setting.dtype)

    theirs = through_trl(load(), subject.tokenizer, rounds)
    update, figures = through_gmpo(load(), rounds, theirs.steps)
    difference = relative_difference(update, theirs.update)
    del update  # a real model's update is half a gigabyte

    def sign_flipped(**tensors: Any) -> ObjectiveTerms:
        terms = OBJECTIVES[rounds.objective](**tensors)
        return replace(terms, loss=-terms.loss)

    wrong, _ = through_gmpo(load(), rounds, theirs.steps, objective=sign_flipped)
    difference_wrong = relative_difference(wrong, theirs.update)
    ours = advantages_of(rounds.groups)
    clipped = [each["clip/low_fraction"] + each["clip/high_fraction"] for each in figures]
    return {
        "objective": rounds.objective,
        "optimizer": rounds.optimizer,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "learning_rate": rounds.learning_rate,
        "steps": rounds.num_rounds * STEPS_PER_ROUND,
        "rows_per_step": rounds.rows_per_step,
        "update_norm": norm(theirs.update),
        "difference": difference,
        "limit": setting.limit,
        "difference_sign_flipped": difference_wrong,
        "largest_advantage_difference": max(
            abs(ours[row] - value) for row, value in theirs.advantages.items()
        ),
        "ratio_min": min(each["ratio/min"] for each in figures),
        "ratio_max": max(each["ratio/max"] for each in figures),
        "clipped_fraction": sum(clipped) / len(clipped),
        "agrees": difference <= setting.limit < difference_wrong,
    }


def made_with() -> dict[str, Any]:
    packages = ("gmpo", "trl", "torch", "transformers")
    return {
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    sys.exit(main())
