"""A calculator as a tool: where the policy writes "37 * 48 =", it puts the value behind it.

The policy's own tokens are trained on. The calculator's are not: the policy sees them, and they
get no gradient.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from gmpo.records import Prompt
from gmpo.rollout_functions import Continuation, RolloutContext, RolloutDraft, RolloutResult

MOST_CALLS = 2
"""Times a completion may ask the calculator."""
MOST_CHARACTERS = 40
"""Of an expression; a product of so few digits stays small."""

EXPRESSION = re.compile(r"([\d.+\-*/() ]+)=\s*$")
OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def rollout(prompts: Sequence[Prompt], context: RolloutContext) -> list[list[RolloutResult]]:
    """G completions a prompt, each drawn up to "=", answered, and drawn on to its end."""
    numbers = range(context.settings.num_completions)
    groups = [[RolloutDraft() for _ in numbers] for _ in prompts]
    running = [(place, number) for place in range(len(prompts)) for number in numbers]
    for call in range(MOST_CALLS + 1):
        wanted = [
            Continuation(
                prompt=place,
                index=number,
                completion_ids=groups[place][number].token_ids,
                max_tokens=tokens_left(prompts[place], groups[place][number], context),
                stop_strings=("=",) if call < MOST_CALLS else (),
            )
            for place, number in running
        ]
        for (place, number), completion in zip(running, context.generate(wanted), strict=True):
            groups[place][number].add_sampled(completion)
        running = [
            (place, number)
            for place, number in running
            if call < MOST_CALLS and goes_on(prompts[place], groups[place][number], context)
        ]
    return [[draft.result() for draft in group] for group in groups]


def goes_on(prompt: Prompt, draft: RolloutDraft, context: RolloutContext) -> bool:
    """Answer a completion that asks; whether there is more of it to draw."""
    text = context.decode(draft.token_ids)
    if draft.finish_reason == "length" or not text.rstrip().endswith("="):
        return False
    value = value_of(text)
    if value is not None:
        answer = context.encode(f" {value}")
        if len(answer) < room_for(prompt, draft, context):
            draft.add_given(answer)
    if tokens_left(prompt, draft, context) == 0:
        draft.finish_reason = "length"
        return False
    return True


def tokens_left(prompt: Prompt, draft: RolloutDraft, context: RolloutContext) -> int:
    """How many tokens the policy may still draw: by its own limit, and by the whole length."""
    drawn = sum(draft.from_policy)
    return min(context.settings.max_tokens - drawn, room_for(prompt, draft, context))


def room_for(prompt: Prompt, draft: RolloutDraft, context: RolloutContext) -> int:
    """How many tokens of any kind still fit."""
    return context.max_length - len(prompt.token_ids or ()) - len(draft.token_ids)


def value_of(text: str) -> str | None:
    """The value of the expression before the "=" at the end, or None if there is none.

    Numbers, brackets and the four operations; nothing of the text is ever executed.
    """
    found = EXPRESSION.search(text.replace("\u00d7", "*"))
    if found is None or len(found[1]) > MOST_CHARACTERS:
        return None
    try:
        value = evaluated(ast.parse(found[1].strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None
    return str(value) if value.denominator == 1 else f"{float(value):.6g}"


def evaluated(node: ast.expr) -> Fraction:
    """The exact value of a syntax tree of numbers and the four operations."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -evaluated(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](evaluated(node.left), evaluated(node.right))
    raise ValueError(f"{ast.dump(node)} is neither a number nor one of the four operations")
