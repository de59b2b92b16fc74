"""Sums, differences and products of small numbers, split so that no item is on both sides."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from gmpo.errors import DataError
from gmpo.records import Message, Prompt
from gmpo.tasks.task import Task

__all__ = ["arithmetic_task"]

_ENUMERATION_LIMIT = 200_000  # expressions; listing this many takes about a second
_DEFAULT_SAMPLED_TRAIN_ITEMS = 10_000


@dataclass(frozen=True, kw_only=True)
class _Space:
    """All expressions of `num_terms` operands from an interval, joined by any of the operators."""

    operators: tuple[str, ...]
    operands: range
    num_terms: int

    @property
    def num_expressions(self) -> int:
        return int(len(self.operands) ** self.num_terms * len(self.operators) ** self.num_joints)

    @property
    def num_joints(self) -> int:
        return self.num_terms - 1

    def all_expressions(self) -> list[str]:
        return [
            _expression(operands, operators)
            for operands in itertools.product(self.operands, repeat=self.num_terms)
            for operators in itertools.product(self.operators, repeat=self.num_joints)
        ]

    def random_expression(self, rng: random.Random) -> str:
        operands = [rng.choice(self.operands) for _ in range(self.num_terms)]
        return _expression(operands, [rng.choice(self.operators) for _ in range(self.num_joints)])


def arithmetic_task(  # noqa: PLR0913  (plain keywords, so that a recipe table maps onto them)
    *,
    operators: Sequence[str] = ("+",),
    min_operand: int = 0,
    max_operand: int = 50,
    num_terms: int = 2,
    held_out_items: int = 500,
    train_items: int | None = None,
    split_seed: int = 0,
    instruction: str = "Answer with just the number.",
) -> Task:
    """Questions like "What is 12 + 7? Answer with just the number."

    An item is what an expression means up to the order of operands that commute: the products of
    a sum with their factors sorted, the added ones apart from the subtracted ones, each side
    sorted. So 12 + 7 and 7 + 12 are one item, as are 9 - 2 + 5 and 9 + 5 - 2, and 2 * 3 + 4 and
    4 + 3 * 2; 9 - 2 and 2 - 9 are two. Values are not compared: 5 + 1 and 4 + 2 are two items.
    The split is by item, and an item's name is in `columns["key"]`.

    A space of up to 200,000 expressions is listed in full: training then shows every writing of
    an item, as prompts of their own. Of a larger one, items are drawn without repetition and
    training shows one writing of each. Held-out always shows one.

    Args:
        operators: any of "+", "-" and "*"; the usual precedence holds.
        min_operand: smallest operand, 0 or more.
        max_operand: largest operand.
        num_terms: operands in an expression, 2 or more.
        held_out_items: held-out items, which is also the number of held-out prompts.
        train_items: upper limit of training prompts; None is all of them in a listed space, and
            10,000 in a drawn one.
        split_seed: decides which items are held out, and the order of both sides.
        instruction: put after the question; may be empty.

    Raises:
        DataError: an argument is outside its range, or the space has too few items.
    """
    space = _checked_space(operators, min_operand, max_operand, num_terms)
    if held_out_items < 0 or (train_items is not None and train_items < 1):
        raise DataError(
            f"held_out_items is {held_out_items} and train_items {train_items}; "
            "they must be at least 0 and 1"
        )
    rng = random.Random(f"arithmetic {split_seed}")
    if space.num_expressions <= _ENUMERATION_LIMIT:
        writings = _listed_items(space, rng)
    else:
        wanted = held_out_items + (train_items or _DEFAULT_SAMPLED_TRAIN_ITEMS)
        writings = _drawn_items(space, rng, wanted)
        if train_items is not None and len(writings) < wanted:
            raise DataError(
                f"{len(writings)} different items were found, but held_out_items={held_out_items} "
                f"and train_items={train_items} need {wanted}; lower them or widen the operands"
            )
    keys = list(writings)
    if len(keys) <= held_out_items:
        raise DataError(
            f"the space has {len(keys)} different items, so held_out_items={held_out_items} leaves "
            "none for training; lower held_out_items or widen the operands"
        )
    held_out = [rng.choice(writings[key]) for key in keys[:held_out_items]]
    train = [writing for key in keys[held_out_items:] for writing in writings[key]]
    rng.shuffle(train)
    return Task(
        name="arithmetic",
        train=tuple(_prompt(expression, instruction) for expression in train[:train_items]),
        held_out=tuple(_prompt(expression, instruction) for expression in held_out),
        instruction=instruction,
    )


def _checked_space(
    operators: Sequence[str], min_operand: int, max_operand: int, num_terms: int
) -> _Space:
    if (
        not operators
        or not set(operators) <= {"+", "-", "*"}
        or len(set(operators)) < len(operators)
    ):
        raise DataError(
            f"operators are {list(operators)}; give one or more of '+', '-' and '*', each once"
        )
    if not 0 <= min_operand <= max_operand:
        raise DataError(
            f"operands run from {min_operand} to {max_operand}; "
            "min_operand must be 0 or more and not above max_operand"
        )
    if num_terms < 2:
        raise DataError(f"num_terms is {num_terms}; an expression needs 2 or more")
    return _Space(
        operators=tuple(operators),
        operands=range(min_operand, max_operand + 1),
        num_terms=num_terms,
    )


def _listed_items(space: _Space, rng: random.Random) -> dict[str, list[str]]:
    by_key: dict[str, list[str]] = {}
    for expression in space.all_expressions():
        by_key.setdefault(_key(expression), []).append(expression)
    keys = list(by_key)
    rng.shuffle(keys)
    return {key: by_key[key] for key in keys}


def _drawn_items(space: _Space, rng: random.Random, wanted: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    # A space of many expressions may still hold few items; 50 draws an item are then enough
    # to find nearly all of them, and the caller refuses if too few were found.
    for _ in range(50 * wanted):
        if len(found) == wanted:
            break
        expression = space.random_expression(rng)
        found.setdefault(_key(expression), [expression])
    return found


def _expression(operands: Sequence[int], operators: Sequence[str]) -> str:
    joints = (f" {sign} {operand}" for sign, operand in zip(operators, operands[1:], strict=True))
    return str(operands[0]) + "".join(joints)


def _signed_products(expression: str) -> list[tuple[str, list[int]]]:
    """The products an expression adds or subtracts: 2 * 3 - 4 is [("+", [2, 3]), ("-", [4])]."""
    first, *rest = expression.split(" ")
    products = [("+", [int(first)])]
    for operator, operand in zip(rest[::2], rest[1::2], strict=True):
        if operator == "*":
            products[-1][1].append(int(operand))
        else:
            products.append((operator, [int(operand)]))
    return products


def _key(expression: str) -> str:
    products = sorted((sign, sorted(factors)) for sign, factors in _signed_products(expression))
    return "".join(sign + "*".join(map(str, factors)) for sign, factors in products)


def _value(expression: str) -> int:
    total = 0
    for sign, factors in _signed_products(expression):
        product = 1
        for factor in factors:
            product *= factor
        total += product if sign == "+" else -product
    return total


def _prompt(expression: str, instruction: str) -> Prompt:
    question = f"What is {expression}? {instruction}".strip()
    return Prompt(
        id="arithmetic-" + expression.replace(" ", ""),
        messages=(Message(role="user", content=question),),
        columns={"answer": str(_value(expression)), "key": _key(expression)},
    )
