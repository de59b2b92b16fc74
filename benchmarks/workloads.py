"""What is timed: the prompts and sizes of a round, the same for every side of a comparison."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

from gmpo.inputs import PromptStream
from gmpo.records import Message, Prompt
from gmpo.tasks import arithmetic_task, bundled_task, few_shot_prompt
from gmpo.tasks.task import Task

STEPS_PER_ROUND = 4
"""With a single step GMPO is GRPO, and no old log-probabilities are needed."""
SEED = 0
SGD_LEARNING_RATES = {"fp32": 1e-2, "bf16": 2e-4}
"""Of the rounds that compare gradients: one of AdamW's steps, from moments of zero, has nearly the
same size for every weight, also where the gradient is nothing but rounding. In fp32 a step of 2e-3
is so near the last place of a large weight that rounding takes more than the 1e-4 by which updates
are to differ (scripts/parity.py). In bf16, whose gradients agree to a cosine of 0.998, four steps
of that rate move the policies apart: 0.983 was measured."""

FILLER_WORDS = ("apple", "river", "stone", "cloud", "green", "house", "paper", "light")
"""Each is one token of most vocabularies, so that a prompt has as many tokens as words, and those
of the chat template."""
FILLER_LENGTHS = (8, 32, 96, 224, 480, 992)
"""Words of filler prompts; 32 below the lengths that they stand for, which is what a template and
its default system turn take."""

WORKED_EXAMPLES = 7
"""Solved GSM8K problems before a long prompt's own: at least 512 tokens together."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A round's sizes.

    Attributes:
        name: of the workload.
        prompts: a key of `TASKS`.
        group_size: completions a prompt.
        prompts_per_round: a multiple of STEPS_PER_ROUND.
        max_new_tokens: longest completion.
        model: as `gmpo.policy.load.load_model` takes it.
        learning_rate: of AdamW.
        ignores_end: every completion is `max_new_tokens` long.
        seed: of the prompts' order and of what is drawn.
    """

    name: str
    prompts: str
    group_size: int
    prompts_per_round: int
    max_new_tokens: int
    model: str = "smollm2-135m"
    learning_rate: float = 2e-5
    ignores_end: bool = False
    seed: int = SEED

    @property
    def rows_per_step(self) -> int:
        return self.prompts_per_round * self.group_size // STEPS_PER_ROUND


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            name="short", prompts="sums", group_size=8, prompts_per_round=8, max_new_tokens=32
        ),
        Workload(
            name="words", prompts="words", group_size=8, prompts_per_round=8, max_new_tokens=128
        ),
        Workload(
            name="long-prompt",
            prompts="worked",
            group_size=8,
            prompts_per_round=4,
            max_new_tokens=64,
        ),
    )
}


def sums() -> Task:
    """The quick start's own task."""
    return arithmetic_task(max_operand=50)


def words() -> Task:
    """SVAMP and GSM8K in turns, asked so that a solution is written out."""
    instruction = "Solve it step by step and end with the answer."
    svamp = bundled_task(name="svamp", instruction=instruction)
    gsm8k = bundled_task(name="gsm8k", instruction=instruction)
    pairs = zip(svamp.train, gsm8k.train, strict=False)
    return Task(
        name="words",
        train=tuple(prompt for pair in pairs for prompt in pair),
        held_out=svamp.held_out,
        instruction=instruction,
    )


def worked() -> Task:
    """GSM8K problems, each after solved examples of its own: no two prompts begin alike.

    Examples that all prompts share would let a side that runs what prompts have in common only
    once save more than a group's own prompt.
    """
    task = bundled_task(name="gsm8k")
    size = WORKED_EXAMPLES + 1
    chunks = [task.train[first : first + size] for first in range(0, len(task.train) - size, size)]
    return Task(
        name="worked",
        train=tuple(few_shot_prompt(chunk[0], chunk[1:]) for chunk in chunks),
        held_out=task.held_out,
        instruction=task.instruction,
    )


def filler(words: int) -> Task:
    """Prompts of so many words without a meaning, no two of which begin alike."""
    shuffled = random.Random(SEED)
    prompts = tuple(
        Prompt(
            id=f"filler{words}-{number}",
            messages=(
                Message(role="user", content=" ".join(shuffled.choices(FILLER_WORDS, k=words))),
            ),
            columns={"answer": "0"},
        )
        for number in range(64)
    )
    return Task(name=f"filler-{words}", train=prompts, held_out=(), instruction="")


TASKS: dict[str, Callable[[], Task]] = {
    "sums": sums,
    "words": words,
    "worked": worked,
    **{f"filler-{count}": functools.partial(filler, count) for count in FILLER_LENGTHS},
}


@functools.cache
def training_prompts(kind: str) -> tuple[Prompt, ...]:
    """The task's training prompts, not rendered."""
    return TASKS[kind]().train


def prompts_of(workload: Workload, round_number: int) -> list[Prompt]:
    """The prompts of a round: those a run of gmpo takes then, and the other side gets too."""
    stream = PromptStream(training_prompts(workload.prompts), seed=workload.seed)
    count = workload.prompts_per_round
    return stream.take(round_number * count, count)


def patterned_rewards(count: int, *, group_size: int, live_groups: int) -> list[float]:
    """1, 0, 1, 0, ... in `live_groups` groups and 0 in the others, whatever was said.

    A group whose rewards differ is alive, so this sets how many are. They lie as far apart as they
    can, so that every step gets its share.
    """
    num_groups = count // group_size
    live = {(place + 1) * num_groups // live_groups - 1 for place in range(live_groups)}
    return [float(row // group_size in live and row % group_size % 2 == 0) for row in range(count)]
