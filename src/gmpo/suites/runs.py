"""A model asked the items of suites: loaded once, a part of the items at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from gmpo.assembly import open_evaluator
from gmpo.config import RunConfig
from gmpo.decoding import best_of_draws, mixed_sampler
from gmpo.errors import DataError, ModelError
from gmpo.evaluation import Evaluator
from gmpo.inputs import resolve_model
from gmpo.outcomes import AskedWith, ItemOutcome, Mix, SuiteOutcomes, Way
from gmpo.records import Prompt
from gmpo.suites.items import SuiteItems
from gmpo.tracking import provenance

__all__ = ["Asking", "ask_suites"]

_ROWS_AHEAD = 4
"""Completions begun together, as a multiple of the rows decoded at once: with more, finished rows
are refilled for longer; with fewer, progress shows earlier."""

_Progress = Callable[[str, str, int, int], None]
"""Told suite, way, items done and items in all."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How every item is asked.

    Attributes:
        ways: greedy, sampled, or both.
        seed: of sampled completions: the same for every model, so that differences are theirs.
        keep_texts: whether outcomes hold the completions' texts.
        mix: a second model, whose geometric mixture with the first is what answers; None for none.
    """

    ways: tuple[Way, ...]
    seed: int = 0
    keep_texts: bool = False
    mix: Mix | None = None


def ask_suites(
    config: RunConfig,
    suites: Sequence[SuiteItems],
    asking: Asking,
    *,
    label: str,
    warn: Callable[[str], None] = lambda _: None,
    progress: _Progress = lambda *_: None,
) -> Iterator[SuiteOutcomes]:
    """Outcomes of each suite, each way, as they are done.

    Each suite's own limit of tokens holds, and prompts may take what the model's context leaves
    beside it; of the recipe's limits none does.

    Args:
        config: the recipe: its model, precision, system turn, stop strings, rollouts, time limit.
        suites: what is asked.
        asking: how.
        label: the model's name in tables.
        warn: told in one sentence what is not as expected.
        progress: told after each part.

    Raises:
        gmpo.errors.GmpoError: the model cannot be had, or an item does not fit its context.
    """
    made_with = provenance()
    config = config.model_copy(update={"model": resolve_model(config.model, warn=warn)})
    build = None
    if asking.mix is not None:
        build = partial(mixed_sampler, mix=asking.mix, model=config.model, warn=warn)
    with open_evaluator(config, warn=warn, build=build) as (evaluator, context):
        asked_with = AskedWith(
            prompt_format="chat" if evaluator.renderer.uses_chat else "text",
            system=config.model.system,
            rollout=config.sampling.rollout,
            stop_strings=config.sampling.stop_strings,
            dtype=config.model.dtype,
            mix=asking.mix,
        )
        fitted = [
            (suite, _fitted(evaluator, suite, context=context, model=config.model.name))
            for suite in suites
        ]
        for suite, asker in fitted:
            for way in asking.ways:
                parts = _parts(suite.prompts, way, rows=config.sampling.max_rows)
                items: list[ItemOutcome] = []
                chooser = replace(asker, sample=best_of_draws(asker.sample, count=way.best_of))
                for part in parts:
                    items += chooser.item_outcomes(
                        part, way=way, key=(suite.name, asking.seed), keep_texts=asking.keep_texts
                    )
                    progress(suite.name, way.name, len(items), len(suite.prompts))
                yield SuiteOutcomes(
                    label=label,
                    model=config.model.name,
                    suite=suite.name,
                    title=suite.title,
                    way=way,
                    max_tokens=suite.max_tokens,
                    items=tuple(items),
                    made_with=made_with,
                    asked_with=asked_with,
                )


def _fitted(evaluator: Evaluator, suite: SuiteItems, *, context: int, model: str) -> Evaluator:
    """The evaluator with the suite's limit; refuses items that do not fit beside it."""
    if suite.max_tokens >= context:
        raise ModelError(
            f"suite {suite.name} allows completions of {suite.max_tokens} tokens, and model "
            f"{model!r} takes {context}, prompt and completion together; give --max-tokens below "
            "that"
        )
    lengths = [evaluator.renderer.num_tokens(prompt) for prompt in suite.prompts]
    longest = max(lengths)
    if longest + suite.max_tokens > context:
        name = suite.prompts[lengths.index(longest)].id
        left = context - longest
        remedy = (
            f"give --max-tokens {left} or lower instead of {suite.max_tokens}"
            if left > 0
            else "choose a model with a longer context"
        )
        raise DataError(
            f"item {name!r} of suite {suite.name} has {longest} tokens, and model {model!r} takes "
            f"{context}, prompt and completion together; {remedy}"
        )
    return replace(evaluator, settings=replace(evaluator.settings, max_tokens=suite.max_tokens))


def _parts(prompts: Sequence[Prompt], way: Way, *, rows: int) -> Iterator[Sequence[Prompt]]:
    size = max(1, _ROWS_AHEAD * rows // way.num_draws)
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]
