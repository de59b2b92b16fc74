"""Grading: what is extracted, what exact comparison decides, and a worker that cannot hang us."""

import ast
import os
import signal
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmpo.errors import DataError
from gmpo.grading import Grader, extract_answer, grade_countdown, parse_number
from gmpo.grading.answers import is_hopeless_power

# Evaluates for far longer than any limit here, and is not among the powers refused untried.
ENDLESS = r"\boxed{\binom{100000000}{50000000}}"


@pytest.fixture(scope="module")
def grader():
    with Grader(time_limit_seconds=5.0) as shared:
        yield shared


def worker_pid(grader):
    return grader._worker._process.pid


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"first \boxed{1}, then \boxed{\frac{1}{2}} #### 9", r"\frac{1}{2}"),
        ("<answer> 4 </answer> so the answer is 5", "4"),
        ("work\n#### 1,234\nmore 7", "1,234"),
        ("The answer is 12. I am sure about 3 things", "12"),
        ("**Answer:** 19", "19"),
        ("The answer is:\n19", "19"),
        ("The answer is 3.5.", "3.5"),
        ("12 + 7 = 19", "19"),
        ("10-3", "3"),
        ("it is -3", "-3"),
        ("about \u22124 degrees", "-4"),
        (r"in all $10,\!080$ or 10{,}081", "10,081"),
        (r"so $x = -\dfrac{3}{7}$", r"-\dfrac{3}{7}"),
        (r"\boxed{12 cut off", "12"),
        ("I do not know", None),
        ("", None),
        (r"\boxed{}", None),
    ],
)
def test_the_final_answer_is_found(text, answer):
    assert extract_answer(text) == answer


def test_without_a_number_wanted_the_last_line_is_the_answer():
    assert extract_answer("so 3 of them:\nx + 1\n\n", wants_number=False) == "x + 1"
    assert extract_answer(" \n", wants_number=False) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("19", "19"), ("1,234,567", "1234567"), ("-0.50", "-1/2"), ("3 / 4", "3/4"), (".5", "1/2"),
        (r"\frac{3}{4}", "3/4"), (r"-\dfrac{3}{4}", "-3/4"), ("$1,000$", "1000"), (r"\$5", "5"),
        ("10%", "10"), (r"10\%", "10"), ("5 apples", "5"), (r"5\text{ cm}", "5"), ("1e3", "1000"),
        ("7.", "7"), (r"90^\circ", "90"), ("-$5", "-5"),
    ],
)  # fmt: skip
def test_numbers_are_read_in_their_usual_forms(text, value):
    assert parse_number(text) == parse_number(value) is not None


@pytest.mark.parametrize(
    "text",
    ["5x", "2 pi", "3 million", "5 or 6", "5 hours 30 minutes", "1,2", "1/0", "12 + 7", "x", "",
     "5 m", "9" * 301],
)  # fmt: skip
def test_other_things_are_not_read_as_numbers(text):
    assert parse_number(text) is None


@settings(max_examples=60, deadline=None)
@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{:,}", "${}$", "{} apples", "{}.0"]))
def test_every_way_to_write_a_whole_number_is_right_without_the_worker(number, form):
    grader = Grader()
    verdict = grader.grade(rf"\boxed{{{form.format(number)}}}", str(number))
    assert (verdict.is_correct, verdict.method) == (True, "exact")
    assert not grader.grade(rf"\boxed{{{form.format(number + 1)}}}", str(number)).is_correct
    assert grader._worker is None


@pytest.mark.parametrize(
    ("text", "reference", "is_correct"),
    [
        ("19", "19", True),
        ("12 + 7 = 19", "19", True),
        ("The answer is 12 + 7", "19", False),
        ("The answer is 12 + 7 = 19.", "19", True),
        ("the answer is unknown", "19", False),
        ("0.5", "1/2", True),
        ("2/4", "0.5", True),
        (r"\frac{3}{7}", r"\frac{3}{7}", True),
        (r"it is $\frac{3}{7}$", "7", False),
        ("18", "19", False),
        (r"\boxed{x+1}", "x + 1", True),
        ("Yes", "yes", True),
    ],
)
def test_easy_answers_are_settled_exactly(text, reference, is_correct):
    grader = Grader()
    verdict = grader.grade(text, reference)
    assert (verdict.is_correct, verdict.status, verdict.method) == (is_correct, "graded", "exact")
    assert grader._worker is None
    assert grader.counts["exact"] == 1


@pytest.mark.parametrize(
    ("text", "reference", "is_correct"),
    [
        (r"\boxed{1 + x}", "x+1", True),
        (r"\boxed{2^{1/2}}", r"\sqrt{2}", True),
        (r"\boxed{2^{10}}", "1024", True),
        (r"\boxed{x + 2}", "x+1", False),
        (r"\boxed{0.333333}", "1/3", True),
        ("so it is\n$x+1$", "1+x", True),
    ],
)
def test_what_exact_comparison_leaves_open_is_verified(grader, text, reference, is_correct):
    verdict = grader.grade(text, reference)
    assert (verdict.is_correct, verdict.method) == (is_correct, "math_verify")


@pytest.mark.parametrize(
    ("answer", "is_correct"),
    [
        (r"4.6 \times 10^{-24}", True),
        (r"46 \times 10^{-25}", True),
        (r"-4.6 \times 10^{-24}", False),
        (r"2 \left(4.6 \times 10^{-24}\right)", False),
        (r"4.6001 \times 10^{-24}", False),
    ],
)
def test_tiny_values_are_compared_by_their_digits(grader, answer, is_correct):
    verdict = grader.grade(rf"\boxed{{{answer}}}", r"4.6 \times 10^{-24}")
    assert (verdict.is_correct, verdict.status) == (is_correct, "graded")


def test_sums_of_decimals_are_compared_to_15_places_as_before(grader):
    # In floats 0.1 + 0.2 is 0.3 + 4e-17.
    verdict = grader.grade(r"\boxed{0.3\sqrt{2}}", r"0.1\sqrt{2}+0.2\sqrt{2}")
    assert (verdict.is_correct, verdict.method) == (True, "math_verify")


def test_any_accepted_form_is_right(grader):
    assert grader.grade(r"\boxed{7}", ["x+1", "7"]).method == "exact"
    assert grader.grade(r"\boxed{1+x}", ["7", "x+1"]).is_correct


def test_nothing_to_grade_is_counted_as_no_answer():
    grader = Grader()
    verdict = grader.grade("I do not know", "19")
    assert (verdict.is_correct, verdict.status, verdict.answer) == (False, "no_answer", None)
    assert grader.counts["no_answer"] == 1


def test_an_answer_over_300_characters_is_compared_as_text_and_counted():
    grader = Grader()
    long = "+".join(["x"] * 200)
    assert grader.grade(rf"\boxed{{{long}}}", long).is_correct
    assert not grader.grade(rf"\boxed{{{long}}}", "200x").is_correct
    assert grader.counts["too_long"] == 2
    assert grader._worker is None


def test_an_empty_reference_and_a_limit_of_zero_are_refused():
    with pytest.raises(DataError, match=r"the reference answer is \[\]; it must be a non-empty"):
        Grader().grade("1", [])
    with pytest.raises(DataError, match="time_limit_seconds is 0; it must be above 0"):
        Grader(time_limit_seconds=0)


def test_power_towers_are_refused_untried_as_timeouts():
    grader = Grader()
    for tower in ("9^{9^9}", "9^(9^9)", r"10^{10^{10}}+1", "2^{10000000000}"):
        verdict = grader.grade(rf"\boxed{{{tower}}}", "1024")
        assert (verdict.is_correct, verdict.status) == (False, "timeout")
    assert grader.counts["timeouts"] == grader.counts["refused_powers"] == 4
    assert grader.counts["exact"] == 0
    assert not is_hopeless_power("2^{2^3}")
    assert not is_hopeless_power("x^{10} + 5^{9}")


def test_a_comparison_that_does_not_end_is_a_timeout_within_the_limit(grader):
    grader.grade(r"\boxed{1+x}", "x+1")
    before = grader.counts
    start = time.monotonic()
    verdict = grader.grade(ENDLESS, "x+1")
    assert time.monotonic() - start < 6.0  # the limit is 5 s
    assert (verdict.is_correct, verdict.status, verdict.method) == (False, "timeout", "none")
    assert grader.counts["timeouts"] == before["timeouts"] + 1
    assert grader.counts["math_verify"] == before["math_verify"]
    assert grader.grade(r"\boxed{1+x}", "x+1").is_correct


def test_a_stopped_worker_is_killed_at_the_limit_and_replaced():
    # The comparisons take milliseconds; on a busy machine one has taken more than a second.
    with Grader(time_limit_seconds=3.0) as grader:
        assert grader.grade(r"\boxed{1+x}", "x+1").is_correct
        pid = worker_pid(grader)
        os.kill(pid, signal.SIGSTOP)  # like a C call that no signal handler interrupts
        start = time.monotonic()
        assert grader.grade(r"\boxed{1+x}", "x+1").status == "timeout"
        assert 3.0 <= time.monotonic() - start < 4.0
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert grader.grade(r"\boxed{1+x}", "x+1").is_correct
        assert worker_pid(grader) != pid
        assert grader.counts["worker_restarts"] == 1
        assert grader.counts["timeouts"] == 1


def test_a_worker_killed_while_it_works_is_a_timeout_at_once():
    with Grader(time_limit_seconds=30.0) as grader:
        grader.grade(r"\boxed{1+x}", "x+1")
        killer = threading.Timer(0.3, os.kill, (worker_pid(grader), signal.SIGKILL))
        start = time.monotonic()
        killer.start()
        assert grader.grade(ENDLESS, "x+1").status == "timeout"
        assert time.monotonic() - start < 5.0
        killer.join()


def test_a_worker_killed_between_comparisons_costs_no_verdict():
    with Grader() as grader:
        grader.grade(r"\boxed{1+x}", "x+1")
        os.kill(worker_pid(grader), signal.SIGKILL)
        grader._worker._process.wait()
        assert grader.grade(r"\boxed{1+x}", "x+1").is_correct
        assert grader.counts["timeouts"] == 0
        assert grader.counts["worker_restarts"] == 1


def test_threads_get_the_same_verdicts_as_the_main_thread(grader):
    verdicts = {}

    def grade(number):
        verdicts[number] = grader.grade(rf"\boxed{{{number} + x}}", f"x + {number}").is_correct

    threads = [threading.Thread(target=grade, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == dict.fromkeys(range(6), True)


def test_the_callers_alarm_still_rings(grader):
    rung = []
    earlier = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 60.0)
        assert grader.grade(r"\boxed{1+x}", "x+1").is_correct
        remaining, _ = signal.getitimer(signal.ITIMER_REAL)
        assert 0 < remaining < 60.0
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        time.sleep(0.1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    assert rung == [True]


def test_a_forgotten_grader_ends_its_process():
    grader = Grader()
    grader.grade(r"\boxed{1+x}", "x+1")
    pid = worker_pid(grader)
    del grader
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("text", "is_correct"),
    [
        ("(3 + 5) * 7", True),
        ("The expression is (3 + 5) * 7.", True),
        ("7 * (5 + 3) = 56", True),
        (r"\boxed{(3+5) \times 7}", True),
        ("<answer>7*5 + 7*3</answer>", False),  # 7 is used twice
        ("(3 + 5) * 7 * 1", False),  # 1 was not given
        ("3 * 5 + 7", False),  # 22
        ("56 + 0", False),
        ("(3 + 5) / 0 * 7", False),
        ("(3 + 5 * 7", False),
        ("7 * (5 - -3)", False),
        ("I think (3 + 5) * 7, no: 3 + 5 + 7", False),  # the last one counts
    ],
)
def test_countdown_answers_are_evaluated(text, is_correct):
    verdict = grade_countdown(text, (3, 5, 7), 56)
    assert verdict.is_correct is is_correct
    assert (verdict.status, verdict.method) == ("graded", "expression")


def test_countdown_division_is_exact():
    # 8 / (3 - 8/3) = 8 / (1/3) = 24
    assert grade_countdown("8 / (3 - 8 / 3)", (3, 3, 8, 8), 24).is_correct
    assert grade_countdown(r"$\frac{8}{3 - \frac{8}{3}}$", (3, 3, 8, 8), 24).answer is not None


def test_countdown_without_an_expression_has_no_answer():
    assert grade_countdown("I give up on 56", (3, 5, 7), 56).status == "no_answer"
    assert Grader().grade_countdown("7", (7,), 7).status == "no_answer"


def test_countdown_survives_endless_brackets_and_texts():
    assert not grade_countdown("(" * 200 + "1+1" + ")" * 200, (1, 1), 2).is_correct
    assert not grade_countdown("1+" * 400 + "1", (1,) * 401, 401).is_correct


_numbers = st.integers(0, 12).map(str)
_expressions = st.recursive(
    _numbers,
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda p: f"({' '.join(p)})"),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(_expressions.filter(lambda text: " " in text))
def test_expressions_have_the_value_python_gives_them(text):
    tree = ast.parse(text, mode="eval")
    numbers = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    value = eval(compile(tree, "expression", "eval"))
    assert grade_countdown(text, numbers, value).is_correct
    assert not grade_countdown(text, numbers, value + 1).is_correct
    assert not grade_countdown(text, [*numbers, 1], value).is_correct
