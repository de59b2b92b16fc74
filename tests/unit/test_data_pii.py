"""Personal data and secrets: what is found, and what of arithmetic must be left alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmpo.data_checks.pii import PII_KINDS, find_pii
from gmpo.tasks import bundled_task


def kinds(text: str) -> list[str]:
    return [find.kind for find in find_pii(text)]


@pytest.mark.parametrize(
    "text",
    [
        "write to kim.minsu+a@mail.co.kr에 보내세요",
        "\uff4a\uff4f\uff45@corp.io",  # full-width letters
        "<mailto:o_brien@sub.domain.org>",
    ],
)
def test_addresses_are_found(text: str):
    assert kinds(text) == ["email"]


@pytest.mark.parametrize(
    "text", ["kim@example.com", "a@mail.example.org", "x@y.test", "3 @ 4", "user@host", "a@b@c"]
)
def test_addresses_of_nobody_are_left_alone(text: str):
    assert kinds(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "전화는 010-1234-5678로 주세요",
        "01012345678",
        "\uff10\uff11\uff10\u20101234\u20105678",  # full-width digits, another dash
        "+82 10-1234-5678",
        "02-123-4567",
        "(031) 123-4567",
        "call (212) 867-5309 now",
        "212-867-5309",
        "my number is +44 20 7946 0958.",
        "+821012345678",
    ],
)
def test_phone_numbers_are_found(text: str):
    assert kinds(text) == ["phone"]


@pytest.mark.parametrize(
    "text",
    [
        "345-234-1234 = ?",
        "What is 345-234-1234 - 5?",
        "5 + 345-234-1234",
        "x = 3 +12345678901",
        "123-456-7890",  # no area begins with 1
        "(212) 555-0123",  # kept free for films
        "2,345,678,901 apples",
        "3.14159265358979",
        "0.01012345678",
        "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18",
        "+1 2 3",
        "2026-11-26",
    ],
)
def test_arithmetic_is_no_phone_number(text: str):
    assert kinds(text) == []


def test_cards_pass_luhn_and_lie_in_a_networks_range():
    # 4111111111111111: from the right, doubled 1s are 2 (seven of them) and the doubled 4 is 8:
    # 14 + 8 = 22; the other eight digits are 1s: 8; 30 ends in 0.
    assert kinds("pay with 4111 1111 1111 1111 please") == ["card"]
    assert kinds("pay with 4111 1111 1111 1112 please") == []
    assert kinds("3782-822463-10005") == ["card"]
    # 1111111111111117: doubled 1s give 16, the others 7 + 7 = 14; 30, but nobody's range.
    assert kinds("1111111111111117") == []
    assert kinds("4111 1111-1111 1111") == []  # no card is written with two separators
    assert kinds("0.4111111111111111") == []


def luhn_digit(digits: str) -> int:
    """The slow way: try all."""
    for last in range(10):
        total = 0
        for place, digit in enumerate(reversed(f"{digits}{last}")):
            value = int(digit) * (2 if place % 2 else 1)
            total += value - 9 if value > 9 else value
        if total % 10 == 0:
            return last
    raise AssertionError(digits)


@given(st.text("0123456789", min_size=14, max_size=14), st.integers(1, 9), st.integers(0, 15))
def test_one_wrong_digit_of_a_card_is_noticed(middle: str, by: int, place: int):
    card = f"4{middle}{luhn_digit('4' + middle)}"
    assert "card" in kinds(card)
    wrong = card[:place] + str((int(card[place]) + by) % 10) + card[place + 1 :]
    assert "card" not in kinds(wrong)


def test_resident_numbers_have_a_date_and_a_check_digit():
    # 9*2 + 0 + 0 + 1*5 + 0 + 1*7 + 1*8 + 2*9 + 3*2 + 4*3 + 5*4 + 6*5 = 124; 11 - 124 % 11 = 8.
    assert kinds("900101-1234568") == ["resident_number"]
    assert kinds("9001011234568") == ["resident_number"]
    assert kinds("900101-1234567") == []
    # A foreigner's 5 in place of the 1 adds 32: 156; 13 - 156 % 11 = 11, which ends in 1.
    assert kinds("900101-5234561") == ["resident_number"]
    assert kinds("900101-5234568") == []
    # 901301: there is no month 13, though 9*2 + 1*5 + 3*6... were to fit.
    assert not any(kinds(f"901301-123456{last}") for last in range(10))


def test_resident_numbers_since_october_2020_have_no_check_digit():
    # 2*2 + 1*4 + 5*7 + 3*8 = 67; 11 - 67 % 11 = 10: the check digit would be 0.
    assert kinds("201005-3000001") == ["resident_number"]
    assert kinds("201004-3000001") == []
    assert kinds("2010053000001") == []  # any number of 13 digits


def test_account_numbers_have_their_countrys_length_and_remainder():
    assert kinds("GB82 WEST 1234 5698 7654 32") == ["iban"]
    assert kinds("to DE89370400440532013000 AND MORE") == ["iban"]
    assert kinds("GB82 WEST 1234 5698 7654 33") == []
    assert kinds("DE89 3704 0044 0532 0130 0") == []
    assert kinds("ZZ89 3704 0044 0532 0130 00") == []


@pytest.mark.parametrize(
    "key",
    [
        "sk-" + "proj-a1B2c3D4e5F6g7H8i9J0",
        "sk_" + "live_a1B2c3D4e5F6g7H8",
        "AKIA" + "ABCDEFGHIJKLMNOP",
        "ghp_" + "a" * 36,
        "hf_" + "A" * 34,
        "AIza" + "b" * 35,
        "xoxb-" + "1234567890-abc",
        "-----BEGIN RSA " + "PRIVATE KEY-----",
    ],
)
def test_keys_are_found_and_not_repeated(key: str):
    (find,) = find_pii(f"use {key}, please")
    assert find.kind == "api_key"
    assert find.excerpt == f"{key[:2]}...{key[-2:]}"


def test_words_that_begin_like_a_key_are_none():
    assert kinds("sk-learn-and-other-libraries-of-the-field, task-1, AKIA, desk-12") == []


def test_no_character_counts_twice_and_kinds_can_be_chosen():
    # 13 digits in Visa's old length that are a resident number too would be named once.
    text = "010-1234-5678 kim@mail.kr 900101-1234568 4111111111111111"
    assert kinds(text) == ["resident_number", "card", "phone", "email"]
    assert [find.kind for find in find_pii(text, ["email"])] == ["email"]
    assert set(PII_KINDS) == {"email", "phone", "card", "resident_number", "iban", "api_key"}


def test_word_problems_hold_no_personal_data():
    task = bundled_task(name="svamp", held_out_items=300)
    texts = [prompt.messages[-1].content for prompt in (*task.train, *task.held_out)]
    assert len(texts) == 1000
    assert not [find for text in texts for find in find_pii(text)]
