"""Rollouts by a function of the user's: what it can ask for, and what it may return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.models import character_tokenizer, tiny_model

from gmpo.errors import ConfigError, DataError
from gmpo.policy.llama import LlamaBody
from gmpo.records import Group, Prompt
from gmpo.rollout_functions import (
    Continuation,
    FunctionRollouts,
    RolloutContext,
    RolloutDraft,
    RolloutFunction,
    RolloutResult,
)
from gmpo.rollouts import PromptRenderer, SamplingSettings, sample_groups
from gmpo.sampler.decoders import LlamaDecoder
from gmpo.sampler.local import LocalSampler

VOCABULARY = tiny_model().config.vocab_size
SETTINGS = SamplingSettings(num_completions=3, max_tokens=10, temperature=1.0, stop_ids=(1,))


def sampler() -> LocalSampler:
    tokenizer = character_tokenizer()
    # fp64, so that decoding and prefill give the same distribution to the last bit that matters.
    decoder = LlamaDecoder(LlamaBody(tiny_model(dtype=torch.float64)), max_rows=8)
    return LocalSampler(decoder, context_length=256, max_rows=8, decode=tokenizer.decode)


def prompts(*texts: str, ids: Sequence[str] | None = None) -> list[Prompt]:
    renderer = PromptRenderer(
        character_tokenizer(), prompt_format="text", system=None, max_prompt_tokens=64
    )
    names = ids or [f"p{n}" for n in range(len(texts))]
    return [
        renderer.render(Prompt(id=name, text=text)) for name, text in zip(names, texts, strict=True)
    ]


def made_by(function: RolloutFunction, *, max_length: int = 64) -> FunctionRollouts:
    return FunctionRollouts(
        function=function,
        sampler=sampler(),
        tokenizer=character_tokenizer(),
        max_length=max_length,
        vocabulary_size=VOCABULARY,
    )


def groups_of(
    function: RolloutFunction, asked: Sequence[Prompt], *, max_length: int = 64
) -> list[Group]:
    return made_by(function, max_length=max_length)(asked, settings=SETTINGS, key=(0, 0))


def usual(asked: Sequence[Prompt]) -> list[Group]:
    return sample_groups(
        sampler(), asked, tokenizer=character_tokenizer(), settings=SETTINGS, key=(0, 0)
    )


def assert_same_tokens(ours: Sequence[Group], theirs: Sequence[Group]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        for mine, yours in zip(one.rollouts, other.rollouts, strict=True):
            assert mine.token_ids.tolist() == yours.token_ids.tolist()
            np.testing.assert_allclose(mine.sampler_logprobs, yours.sampler_logprobs, atol=1e-9)
            assert (mine.text, mine.finish_reason) == (yours.text, yours.finish_reason)


def in_one_turn(asked: Sequence[Prompt], context: RolloutContext) -> list[list[RolloutResult]]:
    return in_turns_of(context.settings.max_tokens)(asked, context)


def in_turns_of(most: int) -> RolloutFunction:
    """Rollouts drawn a few tokens at a time, the last prompt first."""

    def function(asked: Sequence[Prompt], context: RolloutContext) -> list[list[RolloutResult]]:
        numbers = range(context.settings.num_completions)
        groups = [[RolloutDraft() for _ in numbers] for _ in asked]
        running = [(place, number) for place in range(len(asked)) for number in numbers][::-1]
        while running:
            wanted = [
                Continuation(
                    prompt=place,
                    index=number,
                    completion_ids=groups[place][number].token_ids,
                    max_tokens=min(
                        most, context.settings.max_tokens - len(groups[place][number].token_ids)
                    ),
                )
                for place, number in running
            ]
            for (place, number), drawn in zip(running, context.generate(wanted), strict=True):
                groups[place][number].add_sampled(drawn)
            running = [
                (place, number)
                for place, number in running
                if groups[place][number].finish_reason == "length"
                and len(groups[place][number].token_ids) < context.settings.max_tokens
            ]
        return [[draft.result() for draft in group] for group in groups]

    return function


# What a function can ask for


@pytest.mark.parametrize("function", [in_one_turn, in_turns_of(1), in_turns_of(3)])
def test_a_rollout_drawn_in_turns_is_the_one_drawn_at_once(function: RolloutFunction):
    asked = prompts("2+3", "7*8")
    assert_same_tokens(groups_of(function, asked), usual(asked))


def test_two_prompts_of_one_id_draw_their_own_completions():
    asked = prompts("2+3", "2+3", ids=["same", "same"])
    ours = groups_of(in_one_turn, asked)
    assert_same_tokens(ours, usual(asked))
    first, second = ([r.token_ids.tolist() for r in group.rollouts] for group in ours)
    assert first != second


def test_another_attempt_draws_other_tokens_and_the_same_one_the_same():
    def drawn(attempt: int) -> list[list[int]]:
        context = RolloutContext(
            sampler(),
            prompts("2+3"),
            tokenizer=character_tokenizer(),
            settings=SETTINGS,
            max_length=64,
            key=(0,),
        )
        wanted = [Continuation(prompt=0, index=n, attempt=attempt) for n in range(3)]
        return [completion.token_ids.tolist() for completion in context.generate(wanted)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(0)


def test_rollouts_of_one_prompt_share_its_prefill(monkeypatch: pytest.MonkeyPatch):
    ours = made_by(in_one_turn)
    sizes: list[int] = []
    submit = ours.sampler.submit
    monkeypatch.setattr(
        ours.sampler, "submit", lambda r: (sizes.append(r.num_completions), submit(r))[1]
    )

    def forwards(asked: Sequence[Prompt], context: RolloutContext) -> Any:
        wanted = [Continuation(prompt=p, index=n) for p in range(2) for n in range(3)]
        drawn = iter(context.generate(wanted))
        groups = []
        for _ in range(2):
            drafts = [RolloutDraft() for _ in range(3)]
            for draft in drafts:
                draft.add_sampled(next(drawn))
            groups.append([draft.result() for draft in drafts])
        return groups

    replace(ours, function=forwards)(prompts("2+3", "7*8"), settings=SETTINGS, key=(0, 0))
    assert sizes == [3, 3]


def test_a_continuation_of_a_rollout_that_does_not_exist_is_refused():
    def function(asked: Sequence[Prompt], context: RolloutContext) -> Any:
        return context.generate([Continuation(prompt=1, index=0)])

    with pytest.raises(DataError, match=r"is for prompt 1, rollout 0; there are 1 prompts with 3"):
        groups_of(function, prompts("2+3"))


def test_a_continuation_beyond_the_context_is_the_samplers_refusal():
    def function(asked: Sequence[Prompt], context: RolloutContext) -> Any:
        return context.generate([Continuation(prompt=0, index=0, max_tokens=1000)])

    with pytest.raises(ConfigError, match="exceed the model's context of 256"):
        groups_of(function, prompts("2+3"))


# What it may return


def test_given_tokens_stay_in_the_completion_unmarked():
    def function(asked: Sequence[Prompt], context: RolloutContext) -> Any:
        group = []
        for number in range(3):
            draft = RolloutDraft()
            (drawn,) = context.generate([Continuation(prompt=0, index=number, max_tokens=2)])
            draft.add_sampled(drawn)
            draft.add_given(context.encode("=5"))
            group.append(draft.result())
        return [group]

    (group,) = groups_of(function, prompts("2+3"))
    for rollout in group.rollouts:
        count = rollout.num_tokens - 2
        assert rollout.from_policy.tolist() == [True] * count + [False] * 2
        assert rollout.text.endswith("=5")
        assert rollout.sampler_logprobs[-2:].tolist() == [0, 0]
        assert (rollout.sampler_logprobs[:count] < 0).all()
        assert (rollout.first_version, rollout.last_version) == (0, 0)


def returning(**changes: Any) -> Callable[..., Any]:
    """A function whose second rollout is not as it should be."""
    good = RolloutResult(token_ids=[5, 6], from_policy=[True, False], logprobs=[-1.0, 0.0])
    results = [good, replace(good, **changes), good]
    return lambda asked, context: [results for _ in asked]


def test_what_a_function_returns_is_taken_as_it_is():
    (group,) = groups_of(returning(text="seen", finish_reason="length"), prompts("2+3"))
    first, second, _ = group.rollouts
    assert first.token_ids.tolist() == [5, 6]
    assert (second.text, second.is_truncated) == ("seen", True)
    assert first.sampler_logprobs.dtype == np.float32


def test_a_rollout_with_an_error_may_be_empty_and_keeps_its_error():
    failed = returning(token_ids=[], from_policy=[], logprobs=[], error="tool: no connection")
    (group,) = groups_of(failed, prompts("2+3"))
    assert [r.error for r in group.rollouts] == [None, "tool: no connection", None]
    assert group.rollouts[1].num_tokens == 0


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            {"token_ids": [5]},
            "it has (1,) token ids, (2,) marks from_policy and (2,) log-probabilities; give one "
            "of each a token",
        ),
        (
            {"token_ids": [5.0, 6.0]},
            "token ids are float64 and from_policy bool; they must be integers and bool",
        ),
        (
            {"from_policy": [1, 0]},
            "token ids are int64 and from_policy int64; they must be integers and bool",
        ),
        ({"logprobs": ["a", "b"]}, "log-probabilities are <U1; they must be numbers"),
        (
            {"token_ids": [5, VOCABULARY]},
            f"token id {VOCABULARY} is not one of the policy's, 0 to {VOCABULARY - 1}",
        ),
        ({"token_ids": [-1, 5]}, f"token id -1 is not one of the policy's, 0 to {VOCABULARY - 1}"),
        (
            {"logprobs": [np.nan, 0.0]},
            "the log-probability of a sampled token is nan; it must be finite and not above 0, as "
            "`generate` reports it",
        ),
        ({"logprobs": [0.5, 0.0]}, "the log-probability of a sampled token is 0.5; it must be"),
        ({"logprobs": [-np.inf, 0.0]}, "the log-probability of a sampled token is -inf"),
        (
            {"from_policy": [False, False]},
            "no token is the policy's, so there is nothing to train on; return it with error='...'",
        ),
        (
            {"token_ids": [], "from_policy": [], "logprobs": []},
            "no token is the policy's, so there is nothing to train on",
        ),
        (
            {"token_ids": [5] * 70, "from_policy": [True] * 70, "logprobs": [-1.0] * 70},
            "prompt and completion have 73 tokens, more than sampling.max_length = 64; end it "
            "earlier, with finish_reason 'length'",
        ),
        ({"text": 4}, "text is 4; it must be a text or None"),
        ({"error": ValueError("x")}, "error is ValueError('x'); it must be a text or None"),
        ({"finish_reason": "done"}, "finish_reason is 'done'; it must be one of ('stop', 'length'"),
    ],
)
def test_an_unusable_rollout_is_named_with_prompt_and_number(changes: dict[str, Any], what: str):
    with pytest.raises(DataError) as caught:
        groups_of(returning(**changes), prompts("2+3"))
    where = "the rollout function's prompt 'p0', rollout 1: "
    assert str(caught.value).startswith(where + what)


def test_log_probabilities_of_given_tokens_do_not_matter():
    (group,) = groups_of(returning(logprobs=[-1.0, np.nan]), prompts("2+3"))
    assert group.rollouts[1].sampler_logprobs.tolist() == [-1.0, 0.0]


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (
            lambda asked, context: [],
            "the rollout function returned 0 for a list of rollouts for each of the prompts; it "
            "must be 1",
        ),
        (lambda asked, context: None, "the rollout function returned NoneType for a list"),
        (
            lambda asked, context: [[]],
            "the rollout function returned 0 for the rollouts of prompt 'p0'; it must be 3",
        ),
        (
            lambda asked, context: [[None] * 3],
            "the rollout function's prompt 'p0', rollout 0: it is NoneType; it must be a "
            "RolloutResult",
        ),
    ],
)
def test_a_missing_rollout_is_named(function: Any, what: str):
    with pytest.raises(DataError) as caught:
        groups_of(function, prompts("2+3"))
    assert str(caught.value).startswith(what)


def test_a_function_that_raises_is_named_with_its_prompts():
    def boom(asked: Sequence[Prompt], context: RolloutContext) -> Any:
        raise KeyError("tool")

    with pytest.raises(DataError) as caught:
        groups_of(boom, prompts("2+3", "7*8"))
    assert str(caught.value) == (
        f"the rollout function raised KeyError: 'tool' ({__file__}, line "
        f"{boom.__code__.co_firstlineno + 1}), called with 2 prompts, 'p0' to 'p1'; catch what "
        "concerns one rollout and return it with error='...'"
    )
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_function_that_exits_is_named_and_the_process_lives():
    def exits(asked: Sequence[Prompt], context: RolloutContext) -> Any:
        raise SystemExit(3)

    with pytest.raises(DataError, match=r"the rollout function raised SystemExit: 3 \("):
        groups_of(exits, prompts("2+3"))
