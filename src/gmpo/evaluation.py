"""Accuracy of a sampler's model on held-out prompts, with every item's outcome kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gmpo.grading import Grader
from gmpo.records import Prompt
from gmpo.rollouts import GroupSampler, PromptRenderer, SamplingSettings
from gmpo.statistics import wilson_interval
from gmpo.tasks import few_shot_prompt

__all__ = ["Evaluation", "Evaluator", "require_fit"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Outcome of one pass over held-out items, one completion each.

    `outcomes` are in the items' order. A truncated answer is graded as it stands; one whose grading
    timed out counts as wrong. Both are counted here besides.
    """

    name: str
    item_ids: tuple[str, ...]
    outcomes: tuple[bool, ...]
    num_truncated: int
    num_timeouts: int

    @property
    def num_items(self) -> int:
        """Items asked."""
        return len(self.outcomes)

    @property
    def accuracy(self) -> float:
        """Share of items answered correctly."""
        return sum(self.outcomes) / len(self.outcomes)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return wilson_interval(sum(self.outcomes), len(self.outcomes))

    def as_dict(self) -> dict[str, Any]:
        """Figures for JSON."""
        low, high = self.interval
        return {
            "name": self.name,
            "accuracy": self.accuracy,
            "interval_95": [low, high],
            "items": self.num_items,
            "truncated": self.num_truncated,
            "timeouts": self.num_timeouts,
        }

    def as_record(self) -> dict[str, Any]:
        """All of it, for a file: `from_record` brings it back."""
        return {
            **self.as_dict(),
            "outcomes": {
                item: int(outcome)
                for item, outcome in zip(self.item_ids, self.outcomes, strict=True)
            },
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Evaluation:
        """An evaluation as it was written by `as_record`."""
        return cls(
            name=record["name"],
            item_ids=tuple(record["outcomes"]),
            outcomes=tuple(bool(outcome) for outcome in record["outcomes"].values()),
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
    """Asks held-out prompts of one task and grades the answers.

    Attributes:
        sample: as in training, from a sampler that holds the weights to be measured.
        renderer: the same as in training, so that prompts look alike.
        grader: shared with the reward, so that answers are judged alike.
        settings: completions' limit and end tokens; temperature and count are set per call.
        examples: solved training prompts for few-shot evaluation; none, no few-shot pass.
    """

    sample: GroupSampler
    renderer: PromptRenderer
    grader: Grader
    settings: SamplingSettings
    examples: tuple[Prompt, ...] = ()

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
        rollouts = [group.rollouts[0] for group in groups]
        verdicts = [
            self.grader.grade_item(rollout.text, group.prompt.columns)
            for rollout, group in zip(rollouts, groups, strict=True)
        ]
        return Evaluation(
            name=name,
            item_ids=tuple(prompt.id for prompt in prompts),
            outcomes=tuple(verdict.is_correct for verdict in verdicts),
            num_truncated=sum(rollout.is_truncated for rollout in rollouts),
            num_timeouts=sum(verdict.status == "timeout" for verdict in verdicts),
        )
