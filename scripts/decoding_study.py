"""Measure geometric mixtures of two models, and best-of-n, on a recipe's held-out items.

The first model is usually a base model and the second what was trained from it. Greedy decoding of
both and of mixtures in between; then, for one model, the completion with the largest geometric mean
token probability of n draws beside a single draw and beside the share that a perfect choice would
reach. Differences are paired by item. docs/decoding.md quotes the table.

    python scripts/decoding_study.py quickstart smollm2-135m runs/quickstart --json FILE
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from gmpo.assembly import build_sampler
from gmpo.cli.conventions import model_name, warn
from gmpo.config import RunConfig
from gmpo.decoding import (
    MixtureWeights,
    best_rollout,
    build_mixture_sampler,
    require_same_vocabulary,
)
from gmpo.grading import Grader
from gmpo.inputs import held_out_items, prompt_renderer, resolve_model
from gmpo.policy.load import end_token_ids, load_policy, load_tokenizer
from gmpo.policy.score import Policy
from gmpo.recipe import load_recipe
from gmpo.records import Group, Prompt, Rollout
from gmpo.rollouts import GroupSampler, SamplingSettings, sample_groups
from gmpo.statistics import wilson_interval
from gmpo.task_table import build_task
from gmpo.tracking import provenance


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The items and how they are asked."""

    prompts: Sequence[Prompt]
    settings: SamplingSettings
    grader: Grader
    seed: int

    def groups(self, sample: GroupSampler, *, temperature: float, count: int) -> list[Group]:
        settings = replace(self.settings, temperature=temperature, num_completions=count)
        return sample(self.prompts, settings=settings, key=(self.seed, "decoding study"))

    def is_right(self, rollout: Rollout, prompt: Prompt) -> int:
        return int(self.grader.grade_item(rollout.text, prompt.columns).is_correct)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="whose held-out items are asked: bundled name or path")
    parser.add_argument("first", help="model name, model folder or run folder")
    parser.add_argument("second", help="the other model, with the same tokenizer")
    parser.add_argument("--items", type=int, default=200, help="held-out items asked")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--draws", type=int, nargs="+", default=[4, 8], help="n of best-of-n")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here too")
    arguments = parser.parse_args(words)

    overrides = [*arguments.overrides, f"evaluation.items={arguments.items}"]
    config = load_recipe(arguments.recipe, overrides)
    report = measure(config, arguments)
    print(markdown(report))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure(config: RunConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every figure of both tables."""
    model = resolve_model(config.model, warn=warn)
    names = [model_name(name) for name in (arguments.first, arguments.second)]
    tokenizer, other = (load_tokenizer(name) for name in names)
    require_same_vocabulary(tokenizer, other)
    first, second = (load_policy(name, device=model.device, dtype=model.dtype) for name in names)
    task = build_task(config.task)
    rows = config.sampling.max_rows
    settings = SamplingSettings(
        num_completions=1,
        max_tokens=config.evaluation.max_new_tokens or config.sampling.max_new_tokens,
        temperature=0.0,
        stop_ids=end_token_ids(first.model, tokenizer),
        stop_strings=config.sampling.stop_strings,
    )

    with Grader(time_limit_seconds=config.reward.timeout_seconds, warn=warn) as grader:
        asked = Asked(
            prompts=prompt_renderer(config, tokenizer).render_all(held_out_items(config, task)),
            settings=settings,
            grader=grader,
            seed=arguments.seed,
        )
        greedy = {
            weight: mixture_outcomes(asked, (first, second), tokenizer, weight=weight, rows=rows)
            for weight in sorted({0.0, 1.0, *arguments.weights})
        }
        best = [
            row
            for place, policy in (("first", first), ("second", second))
            for row in best_of_rows(
                asked,
                partial(
                    sample_groups,
                    build_sampler(policy, tokenizer, max_rows=rows),
                    tokenizer=tokenizer,
                ),
                model=place,
                draws=arguments.draws,
            )
        ]
    return {
        "made_with": provenance(),
        "task": task.name,
        "first": arguments.first,
        "second": arguments.second,
        "dtype": model.dtype,
        "items": len(asked.prompts),
        "seed": arguments.seed,
        "mixtures": mixture_rows(greedy),
        "best_of": best,
    }


def mixture_outcomes(
    asked: Asked,
    models: tuple[Policy, Policy],
    tokenizer: PreTrainedTokenizerBase,
    *,
    weight: float,
    rows: int,
) -> list[int]:
    """1 or 0 for each item, greedily.

    The sampler, which may hold both models' weights a second time, goes with this call: those of
    all mixtures together would take gigabytes.
    """
    sampler = build_mixture_sampler(
        *models,
        tokenizer,
        weights=MixtureWeights(first=1 - weight, second=weight),
        max_rows=rows,
    )
    groups = asked.groups(
        partial(sample_groups, sampler, tokenizer=tokenizer), temperature=0.0, count=1
    )
    return [asked.is_right(group.rollouts[0], group.prompt) for group in groups]


def mixture_rows(greedy: dict[float, list[int]]) -> list[dict[str, Any]]:
    """Accuracy of each weight, beside the better of the two models alone."""
    alone = max((greedy[0.0], greedy[1.0]), key=sum)
    return [
        {"weight": weight, **accuracy(outcomes), "minus_better": paired(outcomes, alone)}
        for weight, outcomes in greedy.items()
    ]


def best_of_rows(
    asked: Asked, sample: GroupSampler, *, model: str, draws: Sequence[int]
) -> list[dict[str, Any]]:
    """Accuracy of the chosen completion for each n, of the first draw, and of any draw."""
    groups = asked.groups(sample, temperature=1.0, count=max(draws))
    single = [asked.is_right(group.rollouts[0], group.prompt) for group in groups]
    rows = [{"model": model, "n": 1, **accuracy(single), "any_right": statistics.fmean(single)}]
    for count in sorted(draws):
        first = [replace(group, rollouts=group.rollouts[:count]) for group in groups]
        chosen = [asked.is_right(best_rollout(group), group.prompt) for group in first]
        any_right = [
            max(asked.is_right(r, group.prompt) for r in group.rollouts) for group in first
        ]
        rows.append(
            {
                "model": model,
                "n": count,
                **accuracy(chosen),
                "minus_single": paired(chosen, single),
                "any_right": statistics.fmean(any_right),
            }
        )
    return rows


def accuracy(outcomes: Sequence[int]) -> dict[str, Any]:
    return {
        "accuracy": statistics.fmean(outcomes),
        "interval_95": wilson_interval(sum(outcomes), len(outcomes)),
    }


def paired(outcomes: Sequence[int], others: Sequence[int]) -> dict[str, Any]:
    """Mean difference over items with its 95 % interval, mean +- 1.96 standard errors."""
    differences = [one - other for one, other in zip(outcomes, others, strict=True)]
    mean = statistics.fmean(differences)
    half = 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))
    return {"difference": mean, "interval_95": (mean - half, mean + half)}


def markdown(report: dict[str, Any]) -> str:
    lines = [
        f"{report['task']}, {report['items']} held-out items, {report['dtype']}; first "
        f"{report['first']}, second {report['second']}",
        "",
        "| weight of the second | greedy accuracy | 95 % | minus the better model, paired |",
        "| ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['weight']:g} | {row['accuracy']:.3f} | {span(row['interval_95'])} | "
        f"{difference(row['minus_better'])} |"
        for row in report["mixtures"]
    ]
    lines += [
        "",
        "| model | n | accuracy | 95 % | minus one draw, paired | any of n right |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['model']} | {row['n']} | {row['accuracy']:.3f} | {span(row['interval_95'])} | "
        f"{difference(row.get('minus_single'))} | {row['any_right']:.3f} |"
        for row in report["best_of"]
    ]
    return "\n".join(lines)


def span(ends: Sequence[float]) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}"


def difference(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"{found['difference']:+.3f} ({span(found['interval_95'])})"


if __name__ == "__main__":
    raise SystemExit(main())
