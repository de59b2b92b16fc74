"""Rows that say the same."""

from __future__ import annotations

import random
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmpo.data_checks.duplicates import Duplicate, TextIndex, text_digest
from gmpo.tasks import bundled_task


def index(overlap: float | None = 0.6) -> TextIndex:
    return TextIndex(least_overlap=overlap)


def test_case_space_and_compatibility_forms_make_no_difference():
    assert text_digest("What  is\n\uff12 + 3?") == text_digest("what is 2 + 3?")
    assert text_digest("what is 2 + 3?") != text_digest("what is 2 + 4?")
    # printf 'a b' | sha256sum
    assert text_digest(" A\tB ") == (
        "c8687a08aa5d6ed2044328fa6a697ab8e96dc34291e8c2034ae8c38e6fcc6d65"
    )


def test_equal_texts_are_exact_or_contradict_each_other():
    texts = index()
    assert texts.add("one", "How many?", ["5"]) is None
    assert texts.add("two", "how  MANY?", [" 5 "]) == Duplicate(
        kind="exact", key="one", overlap=1.0
    )
    found = texts.add("three", "how many?", ["6"])
    assert found is not None
    assert (found.kind, found.key) == ("contradiction", "one")


def test_overlap_is_that_of_runs_of_three_words():
    # abc bcd cde def and abc bcd cde deg: 3 of 5.
    for least, is_near in ((0.6, True), (0.61, False)):
        texts = index(least)
        texts.add("one", "a b c d e f", ["x"])
        found = texts.add("two", "a b c d e g", ["x"])
        assert (found is not None) == is_near
        if found is not None:
            assert found == Duplicate(kind="near", key="one", overlap=0.6)


def test_the_same_story_with_other_numbers_or_another_answer_is_new():
    story = "Tom has {} apples and buys {} more at the shop near his house in the old town today"
    texts = index()
    assert texts.add("one", story.format(3, 4), ["7"]) is None
    assert texts.add("numbers", story.format(3, 5), ["8"]) is None
    assert texts.add("answer", story.format(3, 4) + " ok", ["1"]) is None
    assert texts.add("near", "Yes. " + story.format(3, 4), ["7"]) is not None


def test_operators_and_signs_without_spaces_are_tokens():
    texts = index()
    texts.add("one", "What is 3 + 5?", ["8"])
    assert texts.add("two", "What is 3 - 5?", ["-2"]) is None
    chinese = "\u5c0f\u660e\u6709\u4e94\u4e2a\u82f9\u679c\u4ed6\u53c8\u4e70\u4e86\u4e09\u4e2a"
    texts.add("three", chinese, ["8"])
    found = texts.add("four", chinese + "\u5427", ["8"])
    assert found is not None and found.key == "three"


def test_without_an_overlap_only_equal_texts_are_found():
    texts = index(None)
    texts.add("one", "a b c d e f g h i j", ["x"])
    assert texts.add("two", "a b c d e f g h i k", ["x"]) is None
    assert texts.add("three", "a b c d e f g h i j", ["x"]) is not None


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12))
def test_a_text_repeats_itself(words: list[str]):
    texts = index()
    text = " ".join(words)
    assert texts.add("one", text, ["1"]) is None
    found = texts.add("two", text.upper(), ["1"])
    assert found is not None and found.kind == "exact"


@pytest.mark.parametrize("count", [40, 300], ids=["one by one", "searched"])
def test_what_is_found_is_what_comparing_all_pairs_finds(count: int):
    source = bundled_task(name="gsm8k").held_out[:count]
    generator = random.Random(0)
    # Without numbers and with one answer, all texts could repeat each other.
    texts = [without_digits(prompt.messages[-1].content) for prompt in source]
    searched = index(0.6)
    for place, words in enumerate(texts):
        assert searched.add(f"{place}", " ".join(words), ["same"]) is None
    found = wanted = 0
    for place, words in enumerate(texts):
        changed = list(words)
        for _ in range(generator.randint(1, 6)):
            changed[generator.randrange(len(changed))] = "something"
        overlap = slow_overlap(words, changed)
        hit = searched.add(f"changed {place}", " ".join(changed), ["same"])
        if hit is not None:
            assert (hit.kind, hit.key) == ("near", f"{place}")
            assert hit.overlap == pytest.approx(overlap)
        wanted += overlap >= 0.6
        found += hit is not None
    assert count / 3 < wanted < count
    assert found <= wanted
    assert found >= (wanted if count <= 64 else 0.98 * wanted)


def without_digits(text: str) -> list[str]:
    found: list[str] = re.findall(r"[a-z]+", text.casefold())
    return found


def test_thousands_of_rows_made_by_a_program_are_not_compared_with_each_other():
    texts = index()
    before = time.process_time()
    for one in range(60):
        for two in range(60):
            asked = f"What is {one} + {two}? Answer with just the number."
            found = texts.add(f"{one} {two}", asked, [str(one + two)])
            assert found is None
    # It takes a tenth of a second; holding each against each would be six million comparisons.
    assert time.process_time() - before < 5


def slow_overlap(one: list[str], other: list[str]) -> float:
    def runs(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[start : start + 3]) for start in range(len(words) - 2)}

    mine, theirs = runs(one), runs(other)
    return len(mine & theirs) / len(mine | theirs)
