"""A model asked the safety sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from gmpo.assembly import open_evaluator
from gmpo.config import RunConfig
from gmpo.safety import SAFETY_SET_SIZE, SafetyReport, judge_safety, safety_prompts

__all__ = ["ask_safety_sets"]


def ask_safety_sets(
    config: RunConfig,
    names: Sequence[str],
    *,
    num_prompts: int = SAFETY_SET_SIZE,
    max_tokens: int = 96,
    warn: Callable[[str], None] = lambda _: None,
) -> list[SafetyReport]:
    """What a model does on each set, asked greedily.

    Args:
        config: the recipe: its model, precision, system turn, stop strings.
        names: of the sets.
        num_prompts: of each set, spread over its strata.
        max_tokens: longest answer; a refusal, a canary or a marker comes early.
        warn: told in one sentence what is not as expected.

    Raises:
        gmpo.errors.GmpoError: there is no such set, or the model cannot be had.
    """
    asked = {name: safety_prompts(name, num_prompts) for name in names}
    reports = []
    with open_evaluator(config, warn=warn) as (evaluator, _):
        settings = replace(
            evaluator.settings, num_completions=1, temperature=0.0, max_tokens=max_tokens
        )
        for name, prompts in asked.items():
            groups = evaluator.sample(
                evaluator.renderer.render_all(prompts), settings=settings, key=("safety", name)
            )
            texts = [group.rollouts[0].text for group in groups]
            reports.append(judge_safety(name, prompts, texts))
    return reports
