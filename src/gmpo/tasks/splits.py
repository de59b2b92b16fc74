"""Prompts divided into a training and a held-out side, so that no question is on both."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gmpo.errors import DataError
from gmpo.records import Prompt
from gmpo.tasks.rows import ReadRows

__all__ = ["Sides", "normalized_text", "question_text", "sides_of_rows", "split_by_text"]

_SHARED = "training rows that are also held out"


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Prompts of two sides, and how many rows became no prompt, by reason."""

    train: list[Prompt]
    held_out: list[Prompt]
    left_out: Mapping[str, int] = field(default_factory=dict)


def sides_of_rows(
    rows: ReadRows,
    others: ReadRows | None,
    *,
    held_out_items: int,
    split_seed: int,
    names: tuple[str, str],
    drops_shared: bool,
) -> Sides:
    """Rows split, or rows to train on beside others that are held out.

    Args:
        rows: to train on.
        others: held out, or None to split `held_out_items` off `rows`.
        held_out_items: how many to hold out; of `others` 0 is all.
        split_seed: decides which.
        names: of both, for messages.
        drops_shared: leave questions that are in both out of training instead of refusing them.

    Raises:
        DataError: a question or an id is in both, `held_out_items` is out of range, or nothing is
            left to train on.
    """
    left_out = Counter(rows.left_out)
    train = rows.prompts
    if others is None:
        train, held_out = split_by_text(train, held_out_items=held_out_items, split_seed=split_seed)
        return Sides(train=train, held_out=held_out, left_out=left_out)
    left_out.update(others.left_out)
    shared = _shared(train, others.prompts)
    if shared and not drops_shared:
        first, its_double = next(iter(shared.items()))
        raise DataError(
            f"{len(shared)} problems of {names[0]} are also in {names[1]} (first: {first!r}, "
            f"which is {its_double!r}); remove them, or leave them out of training, counted, with "
            "unusable_rows = 'drop'"
        )
    if shared:
        left_out[_SHARED] += len(shared)
        train = [prompt for prompt in train if prompt.id not in shared]
    if not train:
        raise DataError(f"all {len(shared)} problems of {names[0]} are also in {names[1]}")
    both = {prompt.id for prompt in train} & {prompt.id for prompt in others.prompts}
    if both:
        raise DataError(
            f"{len(both)} ids are in both {names[0]} and {names[1]} (first: {min(both)!r}); "
            "make the ids differ"
        )
    held_out = others.prompts
    if held_out_items:
        _, held_out = split_by_text(
            held_out, held_out_items=held_out_items, split_seed=split_seed, may_take_all=True
        )
    return Sides(train=train, held_out=held_out, left_out=left_out)


def split_by_text(
    prompts: Sequence[Prompt],
    *,
    held_out_items: int,
    split_seed: int,
    text_of: Callable[[Prompt], str] | None = None,
    may_take_all: bool = False,
) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts; prompts of equal text are on the same side.

    Texts are ordered by a hash of the seed and the text, so a row's place does not depend on the
    other rows, and taken in that order while they fit. Both sides keep the order of `prompts`.

    Args:
        prompts: all of them.
        held_out_items: how many prompts to hold out, exactly.
        split_seed: decides which.
        text_of: what must not be on both sides; the normalised text of the question by default.
        may_take_all: allow an empty training side.

    Raises:
        DataError: the split leaves no training prompt, or repeated texts do not fit.
    """
    most = len(prompts) - (0 if may_take_all else 1)
    if not 0 <= held_out_items <= most:
        raise DataError(
            f"held_out_items is {held_out_items} with {len(prompts)} rows; "
            f"it must be from 0 to {most}"
        )
    # Hashes and not texts: a long data set must not be in memory a second time.
    members: dict[bytes, list[int]] = {}
    for position, prompt in enumerate(prompts):
        text = (text_of or question_text)(prompt)
        members.setdefault(_key(f"{split_seed} {text}"), []).append(position)
    held: set[int] = set()
    for key in sorted(members):
        if len(held) + len(members[key]) <= held_out_items:
            held.update(members[key])
    if len(held) < held_out_items:
        raise DataError(
            f"{held_out_items} rows cannot be held out without putting one text on both sides "
            f"({len(held)} can); use that number or remove repeated rows"
        )
    train = [prompt for position, prompt in enumerate(prompts) if position not in held]
    return train, [prompts[position] for position in sorted(held)]


def normalized_text(text: str) -> str:
    """The text in lower case with single blanks, for telling whether two texts are the same."""
    return " ".join(text.casefold().split())


def question_text(prompt: Prompt) -> str:
    """What a prompt asks, normalised: all turns but system turns, or the text."""
    turns = [message.content for message in prompt.messages or () if message.role != "system"]
    return normalized_text("\n".join(turns) if prompt.messages else prompt.text or "")


def _shared(train: Sequence[Prompt], held_out: Sequence[Prompt]) -> dict[str, str]:
    """Training prompts whose question is also held out, as id: the other's id."""
    doubles = {_key(question_text(prompt)): prompt.id for prompt in held_out}
    keys = ((prompt.id, _key(question_text(prompt))) for prompt in train)
    return {identity: doubles[key] for identity, key in keys if key in doubles}


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
