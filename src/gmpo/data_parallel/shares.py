"""Work divided among processes: which prompts and which micro-batches each one takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from gmpo.batch import MicroBatch
from gmpo.records import Prompt

__all__ = ["shares_of_batches", "shares_of_prompts"]

_Item = TypeVar("_Item")


def shares_of_prompts(prompts: Sequence[Prompt], count: int) -> list[list[int]]:
    """Places of each share's prompts, in order; shares are as even as prompts of one id allow.

    What is drawn for a prompt goes by its id and by how often the id has come before, so all of one
    id are one share's.
    """
    places: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt.id, []).append(place)
    found = _evenly(list(places.values()), [len(of_id) for of_id in places.values()], count)
    return [sorted(place for of_id in share for place in of_id) for share in found]


def shares_of_batches(batches: Sequence[MicroBatch], count: int) -> list[list[int]]:
    """Places of each share's micro-batches, in order; as even in tokens as they allow."""
    sizes = [batch.prompt_ids.numel() + batch.completion_ids.numel() for batch in batches]
    return [sorted(share) for share in _evenly(range(len(batches)), sizes, count)]


def _evenly(items: Sequence[_Item], sizes: Sequence[int], count: int) -> list[list[_Item]]:
    """The largest first, each to the share that has least; the first of several such."""
    shares: list[list[_Item]] = [[] for _ in range(count)]
    totals = [0] * count
    for place in sorted(range(len(items)), key=lambda place: -sizes[place]):
        least = totals.index(min(totals))
        shares[least].append(items[place])
        totals[least] += sizes[place]
    return shares
