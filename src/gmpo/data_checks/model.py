"""A model asked about the rows of a batch, as it is sampled in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gmpo.config import RunConfig
from gmpo.data_checks.samples import Sampler
from gmpo.outcomes import Way
from gmpo.records import Prompt
from gmpo.suites import SuiteItems
from gmpo.suites.runs import Asking, ask_suites
from gmpo.tasks.task import with_instruction

__all__ = ["model_sampler"]


def model_sampler(
    config: RunConfig,
    *,
    num_samples: int,
    max_tokens: int,
    instruction: str = "",
    warn: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Sampler:
    """Completions at temperature 1 by the recipe's model, which is loaded at each call.

    Args:
        config: its model, precision, system turn, stop strings.
        num_samples: completions of each prompt, at least 1.
        max_tokens: longest completion.
        instruction: on a line of its own after each problem, as the task that is trained on has
            it; may be empty.
        warn: told in one sentence what is not as expected.
        progress: told rows done and rows in all.
    """

    def sample(prompts: Sequence[Prompt]) -> list[list[str]]:
        asked = SuiteItems(
            name="batch",
            title="batch",
            prompts=tuple(with_instruction(prompt, instruction) for prompt in prompts),
            max_tokens=max_tokens,
        )
        way = Way(name="sampled", num_samples=num_samples, temperature=1.0)
        (outcomes,) = ask_suites(
            config,
            [asked],
            Asking(ways=(way,), keep_texts=True),
            label=config.model.name,
            warn=warn,
            progress=lambda _suite, _way, done, of: progress(done, of),
        )
        return [[one.text or "" for one in item.completions] for item in outcomes.items]

    return sample
