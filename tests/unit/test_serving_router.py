"""Who answers: backends in order, breakers, quality; with backends whose answers are given."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from dataclasses import replace

import pytest
from tests.given_backends import REQUEST, STREAM, Given, Interleaved, made, run

from gmpo.serving.backend import (
    AnswerReport,
    Backend,
    BackendError,
    BackendFault,
    Chunk,
    GenerationRequest,
    Router,
    Usage,
)
from gmpo.serving.breaker import BreakerRules
from gmpo.serving.router import Route


def test_the_first_backend_answers_and_its_answer_is_scored():
    a, b = Given("a", probability=0.25), Given("b")
    one = made(a, b)
    assert isinstance(one.router, Router) and isinstance(a, Backend)
    assert run(one.ask) == "a"
    report = one.report
    assert (report.backend, report.served_variant, report.model_version) == ("a", "a", "a-1")
    assert (report.fell_back, report.fallback_reason, b.num_asked) == (False, None, 0)
    assert report.quality_components == {
        "probability": pytest.approx(0.25),
        "distinct": 1.0,
        "terminated": 1.0,
    }
    # floor .05 maps .25 to .2875; weights 1, 1, 1 of the three that are known.
    assert report.quality == pytest.approx(0.2875 ** (1 / 3))
    assert report.mean_logprob == pytest.approx(math.log(0.25))
    assert report.stability is None, "one score is too few"


@pytest.mark.parametrize("fault", ["overloaded", "unavailable", "timeout", "broken", "failed"])
def test_another_backend_answers_when_the_first_fails_before_its_first_token(fault: BackendFault):
    one = made(Given("a", fault=fault), Given("b"))
    assert run(one.ask) == "b"
    assert (one.report.fell_back, one.report.fallback_reason) == (True, fault)
    assert one.report.served_variant == one.report.backend == "b"
    assert one.router.counts == Counter([f"fallback_{fault}"])


def test_a_request_that_is_not_allowed_is_nobodys_fault_and_goes_to_nobody_else():
    b = Given("b")
    one = made(Given("a", fault="bad_request"), b, rules=BreakerRules(failures=1))
    for _ in range(3):
        with pytest.raises(BackendError, match="a fails"):
            run(one.ask)
    assert b.num_asked == 0 and one.router.phases["a"] == "closed"


@pytest.mark.parametrize("fault", ["unavailable", "broken", "failed"])
def test_what_a_fallback_does_not_allow_is_no_answer_to_a_request_that_the_first_may_take(
    fault: BackendFault,
):
    refuses, c = Given("b", fault="bad_request"), Given("c")
    one = made(Given("a", fault=fault, retry_after_seconds=2.0), refuses)
    with pytest.raises(BackendError, match=r"^a fails$") as caught:
        run(one.ask)
    assert (caught.value.fault, caught.value.retry_after_seconds) == (fault, 2.0)
    assert one.router.counts == Counter({"unanswered": 1, "refused_later": 1})
    one = made(Given("a", fault=fault), refuses, c)
    assert run(one.ask) == "c"
    assert one.report.fallback_reason == fault


def test_what_a_fallback_refuses_while_the_first_is_left_alone_is_asked_again_later():
    a, refuses = Given("a", fault="failed"), Given("b", fault="bad_request")
    one = made(a, refuses, rules=BreakerRules(failures=1, open_seconds=10.0))

    async def twice() -> None:
        with pytest.raises(BackendError, match="a fails"):
            await one.ask()
        with pytest.raises(BackendError, match="a: it failed several times") as caught:
            await one.ask()
        assert "b fails" not in str(caught.value)
        assert (caught.value.fault, caught.value.retry_after_seconds) == ("unavailable", 10.0)

    run(twice)


def test_a_fallbacks_refusal_leaves_the_best_low_answer_to_be_served():
    refuses = Given("b", fault="bad_request")
    one = made(Given("a", 0.01), refuses, is_buffered=True, threshold=0.99)
    assert run(one.ask) == "a"
    assert (one.report.fell_back, one.report.is_low_quality) == (False, True)
    one = made(Given("a", 0.01), refuses, Given("c", 0.02), is_buffered=True, threshold=0.99)
    assert run(one.ask) == "c"
    assert one.report.fallback_reason == "low_quality"


def test_after_the_first_token_of_a_stream_nobody_else_is_asked():
    b = Given("b")
    one = made(Given("a", fault="broken", breaks_off=True), b)

    async def ask() -> list[str]:
        chunks = await one.router.route(STREAM, AnswerReport())
        seen = []
        with pytest.raises(BackendError, match="a fails"):
            async for chunk in chunks:
                seen.append(chunk.text)
        return seen

    assert run(ask) == ["a"]
    assert b.num_asked == 0 and one.router.counts == Counter({"cut_streams": 1})


@pytest.mark.parametrize("fault", ["broken", "timeout", "failed", "unavailable"])
def test_a_plain_answer_that_breaks_off_is_given_whole_by_another_backend(fault: BackendFault):
    one = made(Given("a", fault=fault, breaks_off=True), Given("b"), rules=BreakerRules(failures=1))
    assert run(one.ask) == "b", "of the first answer nothing is left"
    assert (one.report.fell_back, one.report.fallback_reason) == (True, fault)
    assert (one.report.backend, one.report.model_version) == ("b", "b-1")
    assert one.router.counts == Counter([f"fallback_{fault}"])
    assert one.router.phases == {"a": "open", "b": "closed"}


def test_a_plain_answer_that_nobody_ends_says_who_began_it():
    one = made(Given("a", fault="broken", breaks_off=True), Given("b", fault="unavailable"))
    with pytest.raises(BackendError, match="a: a fails; b: b fails"):
        run(one.ask)
    assert (one.report.backend, one.report.model_version) == ("a", "a-1")
    assert not one.report.fell_back and one.router.counts == Counter({"unanswered": 1})


def test_a_client_that_leaves_a_held_answer_ends_it_and_blames_nobody():
    a, b = Given("a", hangs=True), Given("b")
    one = made(a, b, rules=BreakerRules(failures=1))

    async def leave() -> None:
        task = asyncio.ensure_future(one.ask())
        while not (one.reports and one.report.backend):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(leave)
    assert (a.num_closed, b.num_asked, one.router.phases["a"]) == (1, 0, "closed")
    assert one.report.backend == "a" and one.report.mean_logprob == pytest.approx(math.log(0.5))


def test_an_answer_that_was_held_goes_on_in_one_piece_a_choice():
    async def chunks_of(request: GenerationRequest) -> list[Chunk]:
        one = made(Interleaved("a"))
        return [chunk async for chunk in await one.router.route(request, AnswerReport())]

    def plain_of(streamed: list[Chunk], index: int, *, is_echo: bool) -> Chunk:
        own = [one for one in streamed if (one.index, one.is_echo) == (index, is_echo)]
        return Chunk(
            index=index,
            text="".join(one.text for one in own),
            token_ids=sum((one.token_ids for one in own), ()),
            logprobs=sum((one.logprobs for one in own), ()),
            is_echo=is_echo,
            finish_reason=None if is_echo else ("stop", "length")[index],
            usage=Usage(prompt_tokens=1, completion_tokens=6) if index and not is_echo else None,
            model_version="a-1",
        )

    asked = replace(REQUEST, n=2, echo=True)
    streamed = asyncio.run(chunks_of(replace(asked, stream=True)))
    assert len(streamed) == 2 + 6 + 2 + 1
    whole = asyncio.run(chunks_of(asked))
    assert whole == [
        plain_of(streamed, 0, is_echo=True),
        plain_of(streamed, 1, is_echo=True),
        plain_of(streamed, 0, is_echo=False),
        plain_of(streamed, 1, is_echo=False),
    ]
    assert [one.text for one in whole] == ["p", "p", "a0a2a4", "a1a3a5"]


def test_an_answer_of_nothing_is_broken():
    one = made(Given("a", says_nothing=True), rules=BreakerRules(failures=1))
    with pytest.raises(BackendError, match="ended before each choice had ended") as caught:
        run(one.ask)
    assert caught.value.fault == "broken"
    assert one.router.phases["a"] == "open" and one.router.counts == Counter({"unanswered": 1})


def test_closing_an_answer_early_closes_the_backends_generator_and_blames_nobody():
    a = Given("a")
    one = made(a, rules=BreakerRules(failures=1))

    async def leave() -> None:
        chunks = await one.router.route(STREAM, AnswerReport())
        await anext(chunks)
        assert a.num_closed == 0
        await chunks.aclose()
        assert a.num_closed == 1

    run(leave)
    assert one.router.phases["a"] == "closed"


def test_the_error_of_a_lone_backend_is_handed_on_as_it_is():
    one = made(Given("a", fault="unavailable", retry_after_seconds=2.0))
    with pytest.raises(BackendError, match=r"^a fails$") as caught:
        run(one.ask)
    assert (caught.value.fault, caught.value.retry_after_seconds) == ("unavailable", 2.0)


def test_an_echoed_prompt_is_passed_on_and_not_averaged():
    one = made(Given("a", probability=0.25, echo="p"))
    assert run(one.ask) == "pa"
    assert one.report.mean_logprob == pytest.approx(math.log(0.25))


def test_a_held_back_answer_that_breaks_off_is_never_seen():
    one = made(
        Given("a", fault="broken", breaks_off=True), Given("b"), is_buffered=True, threshold=0.1
    )
    assert run(one.ask) == "b"
    assert one.report.fallback_reason == "broken"


def test_a_breaker_opens_is_tried_again_and_closes():
    a, b = Given("a", fault="unavailable"), Given("b")
    one = made(a, b)

    async def story() -> None:
        for _ in range(3):
            assert await one.ask() == "b"
        # Two failures opened it, so the third request did not reach it.
        assert (a.num_asked, one.router.phases["a"]) == (2, "open")
        assert one.report.fallback_reason == "breaker_open"
        one.clock.now = 10.0
        assert await one.ask() == "b"
        assert (a.num_asked, one.router.phases["a"]) == (3, "open"), "the probe failed"
        one.clock.now = 29.9
        assert await one.ask() == "b"
        assert a.num_asked == 3, "it is left alone for twice as long"
        one.clock.now, a.fault = 30.0, None
        assert await one.ask() == "a"
        assert one.router.phases == {"a": "closed", "b": "closed"}

    run(story)


def test_a_client_that_leaves_says_nothing_about_the_backend():
    a = Given("a", hangs=True)
    one = made(a, rules=BreakerRules(failures=1))

    async def leave() -> None:
        chunks = await one.router.route(STREAM, AnswerReport())
        await anext(chunks)
        task = asyncio.ensure_future(anext(chunks))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await chunks.aclose()

    run(leave)
    assert (a.num_closed, one.router.phases["a"]) == (1, "closed")


def test_when_all_fail_one_error_names_all():
    one = made(Given("a", fault="timeout"), Given("b", fault="failed"))
    with pytest.raises(BackendError, match="a: a fails; b: b fails") as caught:
        run(one.ask)
    assert (caught.value.fault, caught.value.code) == ("unavailable", "no_backend")
    assert one.router.counts == Counter({"unanswered": 1})
    assert (one.report.backend, one.report.served_variant) == ("", None)


def test_when_all_breakers_are_open_it_is_told_when_to_come_back():
    one = made(Given("a", fault="failed"), rules=BreakerRules(failures=1, open_seconds=10.0))

    async def twice() -> None:
        with pytest.raises(BackendError, match="a fails"):
            await one.ask()
        one.clock.now = 4.0
        with pytest.raises(BackendError, match="left alone") as caught:
            await one.ask()
        assert caught.value.fault == "unavailable"
        assert caught.value.retry_after_seconds == 6.0

    run(twice)


def test_a_low_score_is_answered_by_another_backend_where_answers_are_held_back():
    one = made(Given("a", probability=0.01), Given("b", 0.9), is_buffered=True, threshold=0.5)
    assert run(one.ask) == "b"
    assert (one.report.fell_back, one.report.fallback_reason) == (True, "low_quality")
    assert not one.report.is_low_quality
    assert one.router.counts == Counter({"low_quality": 1, "fallback_low_quality": 1})


def test_where_all_scores_are_low_the_best_is_served():
    one = made(
        Given("a", 0.01), Given("b", 0.02), Given("c", 0.015), is_buffered=True, threshold=0.99
    )
    assert run(one.ask) == "b"
    assert one.report.is_low_quality and one.report.fallback_reason == "low_quality"
    assert one.router.counts["low_quality"] == 3 and one.router.counts["low_quality_served"] == 1
    # A low answer is better than an error of the other backend.
    one = made(Given("a", 0.01), Given("b", fault="failed"), is_buffered=True, threshold=0.99)
    assert run(one.ask) == "a"
    assert (one.report.fell_back, one.report.fallback_reason) == (False, None)


def test_observed_answers_are_served_whatever_their_score():
    b = Given("b")
    one = made(Given("a", probability=0.01), b, threshold=0.99)
    assert run(one.ask) == "a"
    assert one.report.is_low_quality and b.num_asked == 0
    assert one.router.counts["low_quality"] == 1


def test_scores_of_a_version_become_its_stability():
    a = Given("a")
    one = made(a)

    async def many() -> None:
        for turn in range(20):
            a.probability = (0.1, 0.9)[turn % 2]
            await one.ask()

    run(many)
    low, high = (0.05 + 0.95 * 0.1) ** (1 / 3), (0.05 + 0.95 * 0.9) ** (1 / 3)
    assert one.report.stability == pytest.approx(math.sqrt(low * high) / ((low + high) / 2))


def test_answers_are_verified_where_the_request_brings_a_reference():
    one = made(Given("a", text="The answer is 15"), verifies=True)
    for metadata, verdict in (
        ({"reference": "15"}, 1.0),
        ({"reference": "16"}, 0.0),
        ({"reference": None}, None),
        ({"other": "15"}, None),
        (None, None),
    ):
        body = {"metadata": metadata}
        asked = GenerationRequest(id="r", route="completions", model="m", prompt="a", body=body)
        asyncio.run(one.ask(asked))
        assert one.report.quality_components.get("verified") == verdict
    assert one.router._judge.counts == Counter({"verified": 2})


class Half:
    """An experiment that assigns everybody to the second backend."""

    def assign(self, request: GenerationRequest) -> Route | None:
        arms = {"a": "control", "b": "candidate"}
        return Route(backend="b", experiment="e", variant="candidate", variants=arms)


def test_an_open_breaker_changes_who_serves_and_never_who_was_assigned():
    b = Given("b", fault="unavailable")
    one = made(Given("a"), b)
    one.router.splitting = Half()

    async def story() -> None:
        b.fault = None
        assert await one.ask() == "b"
        assert one.report.served_variant == "candidate" and not one.report.fell_back
        b.fault = "unavailable"
        for _ in range(3):
            assert await one.ask() == "a"
        assert one.router.phases["b"] == "open"
        assert one.report.fallback_reason == "breaker_open"
        for report in one.reports:
            assert (report.experiment, report.assigned_variant) == ("e", "candidate")
        assert one.report.served_variant == "control"

    run(story)


def test_it_is_ready_while_any_backend_is():
    down = Given("b", fault="failed")
    assert run(made(Given("a"), down).router.ready) is True
    assert run(made(down).router.ready) is False


def test_it_is_not_ready_while_every_breaker_is_open():
    a, b = Given("a", fault="unavailable"), Given("b", fault="unavailable")
    one = made(a, b, rules=BreakerRules(failures=1, open_seconds=10.0))

    async def story() -> None:
        with pytest.raises(BackendError):
            await one.ask()
        a.fault = b.fault = None  # both would be found up, and get no request yet
        assert await one.router.ready() is False
        one.clock.now = 9.9
        assert await one.router.ready() is False
        one.clock.now = 10.0
        assert await one.router.ready() is True, "the next request tries"
        assert one.router.phases == {"a": "open", "b": "open"}, "asking lets nothing through"
        a.hangs, b.fault = True, "unavailable"
        trying = asyncio.ensure_future(one.ask())
        while a.num_asked < 2:
            await asyncio.sleep(0)
        assert await one.router.ready() is False, "the one that tries has not ended"
        trying.cancel()
        await asyncio.gather(trying, return_exceptions=True)
        a.hangs = False
        assert await one.router.ready() is True
        assert await one.ask() == "a"
        assert await one.router.ready() is True
        assert one.router.phases == {"a": "closed", "b": "open"}, "one that answers is enough"

    run(story)


def test_the_scoring_of_a_prompt_alone_has_no_quality():
    one = made(Given("a"), threshold=0.99, is_buffered=True)
    asked = GenerationRequest(id="r", route="completions", model="m", prompt="a", max_tokens=0)
    assert asyncio.run(one.ask(asked)) == "a"
    assert one.report.quality is None and not one.report.is_low_quality
