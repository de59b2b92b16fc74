"""Procedural tasks and few-shot prompts: splits by meaning, right answers, determinism."""

import ast
import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmpo.errors import DataError
from gmpo.grading import grade_countdown
from gmpo.records import Message, Prompt
from gmpo.tasks import arithmetic_task, bundled_task, countdown_task, few_shot_prompt
from gmpo.tasks.near_duplicates import near_duplicate_groups, overlaps


def question(prompt):
    return prompt.messages[-1].content


def expression(prompt):
    return question(prompt).removeprefix("What is ").split("?")[0]


def evaluate(text):
    """An obvious reference: Python's own parser, on numbers and operators only."""

    def value(node):
        match node:
            case ast.Constant():
                return Fraction(node.value)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return value(left) - value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return value(left) * value(right)
            case ast.BinOp(left=left, op=ast.Div(), right=right):
                return value(left) / value(right)
        raise AssertionError(ast.dump(node))

    return value(ast.parse(text, mode="eval").body)


def chat(identity, text, **columns):
    return Prompt(id=identity, messages=(Message(role="user", content=text),), columns=columns)


def test_default_sums_to_50_have_500_held_out_pairs_and_both_orders_of_the_rest():
    task = arithmetic_task()
    # 51 operands: 51 * 52 / 2 = 1326 unordered pairs, 826 of them for training
    assert len(task.held_out) == 500
    assert len({prompt.columns["key"] for prompt in task.train}) == 826
    pairs = [tuple(map(int, expression(prompt).split(" + "))) for prompt in task.train]
    assert all((right, left) in set(pairs) for left, right in pairs)


def test_a_sum_and_its_swapped_writing_are_never_on_two_sides():
    task = arithmetic_task(max_operand=12, held_out_items=40)
    train = {frozenset(expression(prompt).split(" + ")) for prompt in task.train}
    held_out = [frozenset(expression(prompt).split(" + ")) for prompt in task.held_out]
    assert train.isdisjoint(held_out)
    assert len(set(held_out)) == 40


def test_differences_keep_their_order():
    task = arithmetic_task(operators=("-",), max_operand=9, held_out_items=30)
    # 10 * 10 = 100 ordered pairs, one writing each
    assert len(task.train) == 70
    assert len({expression(prompt) for prompt in (*task.train, *task.held_out)}) == 100


def test_prompt_text_answer_and_id_are_as_documented():
    task = arithmetic_task(max_operand=1, held_out_items=1)
    prompts = {prompt.id: prompt for prompt in (*task.train, *task.held_out)}
    one = prompts["arithmetic-1+1"]
    assert question(one) == "What is 1 + 1? Answer with just the number."
    assert one.columns == {"answer": "2", "key": "+1+1"}


def meaning(text):
    """All writings of an expression that only swap operands, found by brute force on its terms."""
    terms = text.replace(" - ", " + -").split(" + ")
    variants = [
        [("-" if term.startswith("-") else "") + "*".join(order) for order in
         itertools.permutations(term.lstrip("-").split(" * "))]
        for term in terms
    ]  # fmt: skip
    return {
        order for choice in itertools.product(*variants) for order in itertools.permutations(choice)
    }


@settings(max_examples=6, deadline=None)
@given(
    st.sampled_from([("+",), ("*",), ("+", "-"), ("+", "*"), ("+", "-", "*")]),
    st.integers(2, 3),
    st.integers(0, 5),
)
def test_no_reordering_of_a_held_out_expression_is_trained_on(operators, num_terms, seed):
    task = arithmetic_task(
        operators=operators,
        num_terms=num_terms,
        max_operand=3,
        held_out_items=5,
        split_seed=seed,
    )
    seen = set().union(*(meaning(expression(prompt)) for prompt in task.train))
    for prompt in task.held_out:
        assert meaning(expression(prompt)).isdisjoint(seen)
    for prompt in (*task.train, *task.held_out):
        assert evaluate(expression(prompt)) == int(prompt.columns["answer"])


def test_equal_seeds_give_equal_tasks_and_other_seeds_other_splits():
    first, again = arithmetic_task(split_seed=3), arithmetic_task(split_seed=3)
    assert first == again
    assert first.held_out != arithmetic_task(split_seed=4).held_out


def test_a_large_space_is_drawn_without_repetition():
    task = arithmetic_task(max_operand=999, train_items=300, held_out_items=50)
    keys = [prompt.columns["key"] for prompt in (*task.train, *task.held_out)]
    assert len(task.train) == 300
    assert len(set(keys)) == 350


def test_too_small_spaces_are_refused_with_their_numbers():
    # operands 0 to 5: 6 * 7 / 2 = 21 pairs
    with pytest.raises(DataError, match=r"has 21 different items, so held_out_items=500 leaves"):
        arithmetic_task(max_operand=5)
    # 8 terms of 0..4: 390,625 writings, but at most C(12, 4) = 495 items
    with pytest.raises(DataError, match=r"\d+ different items were found.*need 600"):
        arithmetic_task(max_operand=4, num_terms=8, held_out_items=100, train_items=500)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"operators": ("/",)}, r"operators are \['/'\]; give one or more of"),
        ({"operators": ("+", "+")}, "each once"),
        ({"min_operand": -1}, "operands run from -1 to 50"),
        ({"num_terms": 1}, "num_terms is 1; an expression needs 2 or more"),
        ({"train_items": 0}, "must be at least 0 and 1"),
    ],
)
def test_wrong_arithmetic_arguments_are_refused(arguments, text):
    with pytest.raises(DataError, match=text):
        arithmetic_task(**arguments)


def test_countdown_solutions_reach_their_target_with_each_number_once():
    task = countdown_task(num_numbers=4, held_out_items=20, train_items=80)
    for prompt in (*task.train, *task.held_out):
        columns = prompt.columns
        verdict = grade_countdown(columns["answer"], columns["numbers"], columns["target"])
        assert verdict.is_correct, columns
        assert evaluate(columns["answer"]) == columns["target"]
        assert str(columns["target"]) in question(prompt)


def test_countdown_sides_share_no_numbers_with_target_and_are_deterministic():
    task = countdown_task(held_out_items=50, train_items=200)
    sides = [
        {(tuple(sorted(p.columns["numbers"])), p.columns["target"]) for p in side}
        for side in (task.train, task.held_out)
    ]
    assert [len(side) for side in sides] == [200, 50]
    assert sides[0].isdisjoint(sides[1])
    assert task == countdown_task(held_out_items=50, train_items=200)


def test_countdown_refuses_what_it_cannot_fill():
    with pytest.raises(DataError, match="different items were found, but held_out_items=200"):
        countdown_task(num_numbers=2, max_number=2, train_items=50)
    with pytest.raises(DataError, match="num_numbers is 1"):
        countdown_task(num_numbers=1)
    with pytest.raises(DataError, match="train_items 0"):
        countdown_task(train_items=0)


def test_svamp_keeps_problems_of_one_story_on_one_side():
    task = bundled_task(name="svamp")
    assert (len(task.train), len(task.held_out)) == (700, 300)
    emails = [
        side
        for side in ("train", "held_out")
        for prompt in getattr(task, side)
        if question(prompt).startswith("Jack received")
        and "in the morning," in question(prompt)
        and "afternoon and" in question(prompt)
    ]
    assert len(emails) >= 7
    assert len(set(emails)) == 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_held_out_problem_of_svamp_is_nearly_one_that_is_trained_on(seed: int):
    task = bundled_task(name="svamp", split_seed=seed, instruction="")
    assert (len(task.train), len(task.held_out)) == (700, 300)
    trained, held_out = ([question(p) for p in side] for side in (task.train, task.held_out))
    assert overlaps(held_out, trained).max() < 0.8


def test_texts_that_share_four_fifths_of_their_words_are_in_one_group():
    texts = [
        "Ann had 3 red apples and ate 2",  # ann had # red apples and ate: 7 words
        "Bob sold 1,200 kites",
        "ANN had 45 red apples and sold 7.5",  # 6 of 7
        "Ann saw green pears and sold red apples",  # 5 of 7 of the last one, 4 of 7 of the first
        "apples red and",  # all of its 3 words, which links the one above too
    ]
    assert near_duplicate_groups(texts) == [0, 1, 0, 0, 0]
    assert near_duplicate_groups(texts[:4]) == [0, 1, 0, 3]
    assert near_duplicate_groups(["", ""]) == [0, 1]


def test_gsm8k_has_its_published_sides_and_can_hold_out_a_part():
    task = bundled_task(name="gsm8k", held_out_items=100, instruction="")
    assert (len(task.train), len(task.held_out)) == (7473, 100)
    natalia = next(prompt for prompt in task.train if prompt.id == "gsm8k-train-0")
    assert natalia.columns["answer"] == "72"
    assert question(natalia).startswith("Natalia sold clips to 48")


def test_the_instruction_does_not_change_which_problems_are_held_out():
    plain, asked = (bundled_task(name="svamp", instruction=text) for text in ("", "Just the sum."))
    assert [p.id for p in plain.held_out] == [p.id for p in asked.held_out]
    assert question(asked.held_out[0]) == question(plain.held_out[0]) + "\nJust the sum."


def test_an_unknown_bundled_name_is_refused_with_the_choices():
    with pytest.raises(DataError, match="no bundled data set 'math'; choose 'svamp' or 'gsm8k'"):
        bundled_task(name="math")


def test_examples_stand_between_the_system_turn_and_the_question():
    prompt = Prompt(
        id="p",
        messages=(
            Message(role="system", content="Be short."),
            Message(role="user", content="1 + 1?"),
        ),
        token_ids=(1, 2),
        columns={"answer": "2"},
    )
    shown = few_shot_prompt(prompt, [chat("a", "2 + 2?", answer="4")])
    assert [(m.role, m.content) for m in shown.messages] == [
        ("system", "Be short."),
        ("user", "2 + 2?"),
        ("assistant", "4"),
        ("user", "1 + 1?"),
    ]
    assert (shown.id, shown.columns, shown.token_ids) == ("p", {"answer": "2"}, None)


def test_examples_that_leak_or_lack_an_answer_are_refused():
    prompt = chat("p", "1 + 1?", answer="2")
    with pytest.raises(DataError, match="would show the answer"):
        few_shot_prompt(prompt, [chat("q", "1 + 1?", answer="2")])
    with pytest.raises(DataError, match="example 'q' has answer None"):
        few_shot_prompt(prompt, [chat("q", "2 + 2?")])
    with pytest.raises(DataError, match="'t' is not a chat that ends in a user turn"):
        few_shot_prompt(Prompt(id="t", text="1 + 1 ="), [])
