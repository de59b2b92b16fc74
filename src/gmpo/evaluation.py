"""Accuracy or mean reward of a sampler's model on held-out prompts, every item's outcome kept."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from gmpo.grading import Grader
from gmpo.outcomes import ItemOutcome, Way, item_outcome
from gmpo.records import Group, Prompt
from gmpo.rewards import ScoredGroups
from gmpo.rollouts import GroupSampler, PromptRenderer, SamplingSettings
from gmpo.statistics import wilson_interval
from gmpo.tasks import few_shot_prompt

__all__ = ["Evaluation", "Evaluator", "Measure", "require_fit"]

Measure = Literal["accuracy", "reward"]
"""What is measured on held-out items: answers verified, or the reward that training would give."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Outcome of one pass over held-out items, one completion each.

    `outcomes` are in the items' order: 1 or 0 for an answer, or the reward, None where there is
    none. A truncated answer is graded as it stands; one whose grading timed out counts as wrong.
    Both are counted here besides.
    """

    name: str
    measure: Measure
    item_ids: tuple[str, ...]
    outcomes: tuple[float | None, ...]
    num_truncated: int
    num_timeouts: int

    @property
    def num_items(self) -> int:
        """Items asked."""
        return len(self.outcomes)

    @property
    def num_unrewarded(self) -> int:
        """Items without a reward: a function failed on them, or none said anything about them."""
        return self.outcomes.count(None)

    @property
    def mean(self) -> float:
        """Of the outcomes that there are; NaN without any."""
        found = self._found
        return statistics.fmean(found) if found else math.nan

    @property
    def accuracy(self) -> float | None:
        """Share of items answered correctly; None where the reward was measured."""
        return self.mean if self.measure == "accuracy" else None

    @property
    def reward(self) -> float | None:
        """Mean reward of the items that have one; None where accuracy was measured."""
        return self.mean if self.measure == "reward" else None

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean: Wilson's for accuracy, mean +- 1.96 standard errors else.

        NaN for fewer than two rewards.
        """
        found = self._found
        if self.measure == "accuracy":
            return wilson_interval(round(sum(found)), len(found))
        if len(found) < 2:
            return math.nan, math.nan
        half = 1.96 * statistics.stdev(found) / math.sqrt(len(found))
        return self.mean - half, self.mean + half

    @property
    def _found(self) -> list[float]:
        return [outcome for outcome in self.outcomes if outcome is not None]

    def as_dict(self) -> dict[str, Any]:
        """Figures for JSON, None for NaN."""
        figures = {
            "name": self.name,
            self.measure: _finite(self.mean),
            "interval_95": [_finite(end) for end in self.interval],
            "items": self.num_items,
            "truncated": self.num_truncated,
            "timeouts": self.num_timeouts,
        }
        return (
            figures if self.measure == "accuracy" else figures | {"unrewarded": self.num_unrewarded}
        )

    def as_record(self) -> dict[str, Any]:
        """All of it, for a file: `from_record` brings it back."""
        outcomes: Sequence[float | None] = self.outcomes
        if self.measure == "accuracy":
            outcomes = [int(outcome) for outcome in self._found]
        return {
            **self.as_dict(),
            "outcomes": dict(zip(self.item_ids, outcomes, strict=True)),
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Evaluation:
        """An evaluation as it was written by `as_record`."""
        return cls(
            name=record["name"],
            measure="reward" if "reward" in record else "accuracy",
            item_ids=tuple(record["outcomes"]),
            outcomes=tuple(record["outcomes"].values()),
            num_truncated=record["truncated"],
            num_timeouts=record["timeouts"],
        )


def require_fit(
    prompts: Sequence[Prompt], *, examples: Sequence[Prompt], renderer: PromptRenderer
) -> None:
    """Refuse held-out prompts that are too long, before a model is loaded or asked.

    Raises:
        DataError: one is empty or too long, by itself or after the worked examples.
    """
    renderer.render_all(prompts, remedy="take the prompt out of the held-out items")
    if examples:
        count = len(examples)
        shown = [few_shot_prompt(prompt, examples) for prompt in prompts]
        renderer.render_all(
            shown, remedy=f"lower evaluation.few_shot: these begin with {count} worked examples"
        )


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Asks held-out prompts of one task and grades the answers, or gives them their reward.

    Attributes:
        sample: as in training, from a sampler that holds the weights to be measured.
        renderer: the same as in training, so that prompts look alike.
        grader: shared with the reward, so that answers are judged alike.
        settings: completions' limit and end tokens; temperature and count are set per call.
        reward: None measures accuracy; else what gives groups their reward, by the recipe's
            functions and weights as in training.
        examples: solved training prompts for few-shot evaluation; none, no few-shot pass.
    """

    sample: GroupSampler
    renderer: PromptRenderer
    grader: Grader
    settings: SamplingSettings
    reward: Callable[[Sequence[Group]], ScoredGroups] | None = None
    examples: tuple[Prompt, ...] = ()

    @property
    def measure(self) -> Measure:
        """What it measures."""
        return "accuracy" if self.reward is None else "reward"

    def every_way(
        self, prompts: Sequence[Prompt], *, sampled_key: tuple[int | str, ...] | None
    ) -> Iterator[Evaluation]:
        """Greedy, greedy few-shot and sampled, each as it is done; no key, no sampled pass."""
        yield self.greedy(prompts)
        if self.examples:
            yield self.greedy_few_shot(prompts)
        if sampled_key is not None:
            yield self.sampled(prompts, key=sampled_key)

    def greedy(self, prompts: Sequence[Prompt]) -> Evaluation:
        """Zero-shot, temperature 0."""
        return self._run("greedy", prompts, temperature=0.0)

    def greedy_few_shot(self, prompts: Sequence[Prompt]) -> Evaluation:
        """Temperature 0 after the worked examples."""
        shown = [few_shot_prompt(prompt, self.examples) for prompt in prompts]
        return self._run(f"greedy_{len(self.examples)}_shot", shown, temperature=0.0)

    def sampled(self, prompts: Sequence[Prompt], *, key: tuple[int | str, ...]) -> Evaluation:
        """Zero-shot, temperature 1, one completion an item; `key` names the randomness."""
        return self._run("sampled", prompts, temperature=1.0, key=key)

    def item_outcomes(
        self,
        prompts: Sequence[Prompt],
        *,
        way: Way,
        key: tuple[int | str, ...],
        keep_texts: bool = False,
    ) -> list[ItemOutcome]:
        """What became of each item's completions, asked zero-shot.

        Args:
            prompts: items of a suite, or a part of them: how they are divided changes nothing.
            way: at which temperature, how often.
            key: names the randomness of all items of the suite.
            keep_texts: whether outcomes hold the completions' texts.
        """
        groups = self.sample(
            self.renderer.render_all(prompts),
            settings=replace(
                self.settings, num_completions=way.num_samples, temperature=way.temperature
            ),
            key=("evaluation", *key),
        )
        return [
            item_outcome(
                group,
                [self.grader.grade_item(r.text, group.prompt.columns) for r in group.rollouts],
                keep_texts=keep_texts,
            )
            for group in groups
        ]

    def _run(
        self,
        name: str,
        prompts: Sequence[Prompt],
        *,
        temperature: float,
        key: tuple[int | str, ...] = (0,),
    ) -> Evaluation:
        groups = self.sample(
            [self.renderer.render(prompt) for prompt in prompts],
            settings=replace(self.settings, num_completions=1, temperature=temperature),
            key=("evaluation", *key),
        )
        outcomes, num_timeouts = (
            self._answers(groups) if self.reward is None else self._rewards(groups, self.reward)
        )
        return Evaluation(
            name=name,
            measure=self.measure,
            item_ids=tuple(prompt.id for prompt in prompts),
            outcomes=outcomes,
            num_truncated=sum(group.rollouts[0].is_truncated for group in groups),
            num_timeouts=num_timeouts,
        )

    def _answers(self, groups: Sequence[Group]) -> tuple[tuple[float, ...], int]:
        """1 for each right answer, 0 for each other, and how many gradings did not end."""
        verdicts = [
            self.grader.grade_item(group.rollouts[0].text, group.prompt.columns) for group in groups
        ]
        num_timeouts = sum(verdict.status == "timeout" for verdict in verdicts)
        return tuple(float(verdict.is_correct) for verdict in verdicts), num_timeouts

    def _rewards(
        self, groups: Sequence[Group], reward: Callable[[Sequence[Group]], ScoredGroups]
    ) -> tuple[tuple[float | None, ...], int]:
        """Each completion's reward, and how many gradings did not end."""
        scored = reward(groups)
        return tuple(group.rollouts[0].reward for group in scored.groups), scored.num_timeouts


def _finite(value: float) -> float | None:
    """The value, or None, which JSON has, for NaN, which it has not."""
    return value if math.isfinite(value) else None
