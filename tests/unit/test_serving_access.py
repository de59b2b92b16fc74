"""Wrong API keys of an address: counted, waited for, forgotten."""

from __future__ import annotations

import pytest

from gmpo.serving.access import WrongKeys


def test_an_address_waits_after_so_many_and_begins_anew():
    wrong = WrongKeys(most=2, seconds=60.0)
    wrong.note("192.0.2.1", now=100.0)
    assert wrong.seconds_left("192.0.2.1", now=100.0) == 0.0
    wrong.note("192.0.2.1", now=130.0)
    # The minute is that of the first: it ends at 160.
    assert wrong.seconds_left("192.0.2.1", now=130.0) == 30.0
    assert wrong.seconds_left("192.0.2.2", now=130.0) == 0.0
    assert wrong.seconds_left("192.0.2.1", now=160.0) == 0.0
    wrong.note("192.0.2.1", now=160.0)
    assert wrong.seconds_left("192.0.2.1", now=160.0) == 0.0


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("", "", True),
        ("/run/gmpo.sock", "", False),
    ],
)
def test_what_counts_as_one_address(one: str, other: str, is_same: bool):
    wrong = WrongKeys(most=1, seconds=60.0)
    wrong.note(one, now=0.0)
    assert (wrong.seconds_left(other, now=0.0) > 0) is is_same


def test_memory_is_bounded_and_what_is_forgotten_too_early_is_counted():
    wrong = WrongKeys(most=1, seconds=60.0, max_addresses=3)
    for number in range(5):
        wrong.note(f"192.0.2.{number}", now=float(number))
    # 0 and 1 made room for 3 and 4.
    waiting = [wrong.seconds_left(f"192.0.2.{number}", now=5.0) > 0 for number in range(5)]
    assert waiting == [False, False, True, True, True]
    assert wrong.num_forgotten == 2
    # The minutes of the others are over: they are not missed.
    for number in range(10, 13):
        wrong.note(f"192.0.2.{number}", now=100.0)
    assert wrong.num_forgotten == 2
