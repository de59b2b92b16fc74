"""A task: training prompts and held-out prompts with reference answers; few-shot prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from gmpo.errors import DataError
from gmpo.records import Message, Prompt
from gmpo.tasks.splits import Sides

__all__ = ["Task", "few_shot_prompt", "task_of_sides", "with_instruction"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts to train on and prompts to evaluate on; no item is on both sides.

    Every prompt is a chat ending in a user turn and has `columns["answer"]`. `instruction` is the
    sentence that was added to every problem, kept so that a user's own prompt can be put the same
    way; it may be empty. `left_out` counts, by reason, the rows of the data that became no prompt.
    """

    name: str
    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    instruction: str
    left_out: Mapping[str, int] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """What a person should know before using it, a sentence each."""
        counts = self.left_out.items()
        return [f"task {self.name}: {count} {reason} left out" for reason, count in counts]


def task_of_sides(name: str, sides: Sides, *, instruction: str) -> Task:
    """A task from its two sides, with the instruction added to every problem."""
    for side in (sides.train, sides.held_out):
        # In place, so that each old prompt is freed before the next new one is made.
        for position, prompt in enumerate(side):
            side[position] = with_instruction(prompt, instruction)
    return Task(
        name=name,
        train=tuple(sides.train),
        held_out=tuple(sides.held_out),
        instruction=instruction,
        left_out=sides.left_out,
    )


def few_shot_prompt(prompt: Prompt, examples: Sequence[Prompt]) -> Prompt:
    """The same prompt with solved examples before its last user turn.

    Each example adds two turns: its own last user turn, and its `answer` as the assistant's. Other
    turns of an example (a system turn, say) are not taken over. The result keeps id and columns;
    token ids are cleared, because the text changed.

    Args:
        prompt: a chat that ends in a user turn.
        examples: chats that end in a user turn and have `columns["answer"]`, in the order shown.

    Raises:
        DataError: a prompt is no such chat, an example has no answer or is the prompt itself.
    """
    *earlier, question = _chat_of(prompt)
    shots: list[Message] = []
    for example in examples:
        example_question = _chat_of(example)[-1]
        if example.id == prompt.id or example_question == question:
            raise DataError(
                f"example {example.id!r} asks what prompt {prompt.id!r} asks, so it would show "
                "the answer; take examples from the training side"
            )
        answer = example.columns.get("answer")
        if not isinstance(answer, str) or not answer:
            raise DataError(
                f"example {example.id!r} has answer {answer!r}; an example needs a non-empty text "
                "in columns['answer']"
            )
        shots += [example_question, Message(role="assistant", content=answer)]
    return replace(prompt, messages=(*earlier, *shots, question), token_ids=None)


def with_instruction(prompt: Prompt, instruction: str) -> Prompt:
    """The same prompt with `instruction` on a line of its own after its last user turn.

    Raises:
        DataError: the prompt is not a chat that ends in a user turn.
    """
    if not instruction:
        return prompt
    *earlier, question = _chat_of(prompt)
    asked = Message(role="user", content=f"{question.content}\n{instruction}")
    return replace(prompt, messages=(*earlier, asked), token_ids=None)


def _chat_of(prompt: Prompt) -> tuple[Message, ...]:
    if not prompt.messages or prompt.messages[-1].role != "user":
        raise DataError(
            f"prompt {prompt.id!r} is not a chat that ends in a user turn, so examples have no "
            "place in it; give it messages with the question last"
        )
    return prompt.messages
