"""Rows that say the same."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmpo.data_duplicates import Duplicate, TextIndex, text_digest
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


def test_the_hashed_search_finds_what_comparing_all_pairs_finds():
    source = bundled_task(name="gsm8k").held_out
    generator = random.Random(0)
    texts = [prompt.messages[-1].content.split() for prompt in source[:150]]
    changed = []
    for words in texts:
        edits = generator.randint(1, 4)
        mine = list(words)
        for _ in range(edits):
            mine[generator.randrange(len(mine))] = "something"
        changed.append(mine)
    keeps_numbers = [sorted(filter(str.isdigit, "".join(a))) for a in texts]
    expected = set()
    for place, mine in enumerate(changed):
        if sorted(filter(str.isdigit, "".join(mine))) == keeps_numbers[place]:
            expected.add(place)
    searched = index(0.6)
    for place, words in enumerate(texts):
        assert searched.add(f"{place}", " ".join(words), ["same"]) is None
    found = 0
    wanted = 0
    for place in sorted(expected):
        overlap = slow_overlap(texts[place], changed[place])
        hit = searched.add(f"changed {place}", " ".join(changed[place]), ["same"])
        if overlap < 0.6:
            continue
        wanted += 1
        if hit is not None:
            assert (hit.key, hit.overlap) == (f"{place}", pytest.approx(overlap, abs=0.08))
            found += 1
    assert wanted > 50
    assert found >= 0.95 * wanted


def slow_overlap(one: list[str], other: list[str]) -> float:
    def runs(words: list[str]) -> set[tuple[str, ...]]:
        plain = [word.casefold().strip(".,?!$%\"'") for word in words]
        return {tuple(plain[start : start + 3]) for start in range(len(plain) - 2)}

    mine, theirs = runs(one), runs(other)
    return len(mine & theirs) / len(mine | theirs)
