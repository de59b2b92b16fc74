"""Start-up checks of the fast paths: what agrees is used, and what is broken on purpose is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.models import FAMILIES, character_tokenizer, tiny_model

from gmpo import engine
from gmpo.engine import build_decoder, build_sampler
from gmpo.errors import ModelError
from gmpo.policy import agreement, prefix
from gmpo.policy.agreement import (
    LARGEST_LOGIT_DIFFERENCE,
    LARGEST_OVER_POSITIONS,
    extended_difference,
    scored_difference,
)
from gmpo.policy.llama import LlamaBody
from gmpo.policy.load import load_policy, model_folder
from gmpo.policy.score import Policy
from gmpo.sampler import decoders, graphed
from gmpo.sampler.agreement import decoded_difference
from gmpo.sampler.decoders import LlamaDecoder, TransformersDecoder
from gmpo.sampler.prepared import PreparedBody
from gmpo.sampler.requests import SampleRequest, complete

LLAMA_FAMILIES = [family for family in FAMILIES if family != "gpt2"]
ROUNDING = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 0.1}


def backwards(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same with rows in the wrong order."""
    return lambda *given, **named: function(*given, **named).flip(0)


def exchanged(prepared: PreparedBody) -> PreparedBody:
    """Two layers in each other's place."""
    first, second, *others = prepared.layers
    return replace(prepared, layers=(second, first, *others))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def policy(said: list[str]) -> Policy:
    return Policy(tiny_model(), warn=said.append)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("family", LLAMA_FAMILIES)
def test_the_fast_paths_agree_with_the_model(family: str, dtype: torch.dtype):
    body = LlamaBody(tiny_model(family, dtype=dtype))
    for measure in (extended_difference, scored_difference, decoded_difference):
        assert measure(body) < ROUNDING[dtype]


def test_what_agrees_is_used_without_a_word(policy: Policy, said: list[str]):
    assert policy.shares_prompts
    assert isinstance(build_decoder(policy, max_rows=4), LlamaDecoder)
    assert said == []


def test_a_training_pass_that_is_wrong_is_not_used(
    monkeypatch: pytest.MonkeyPatch, said: list[str]
):
    monkeypatch.setattr(
        agreement, "scored_hidden_states", backwards(agreement.scored_hidden_states)
    )
    policy = Policy(tiny_model(), warn=said.append)
    assert not policy.shares_prompts
    (warning,) = said
    assert "the fast path's logits (training) differ" in warning
    assert warning.endswith("it runs on the plain path: same results, slower")
    assert isinstance(build_decoder(policy, max_rows=4), TransformersDecoder)
    assert len(said) == 1


def test_prompts_that_are_run_wrong_are_not(monkeypatch: pytest.MonkeyPatch, said: list[str]):
    def late(body: LlamaBody, token_ids: torch.Tensor, *given: Any, **named: Any) -> Any:
        return prefix.extend(body, token_ids.roll(1, dims=1), *given, **named)

    monkeypatch.setattr(agreement, "extend", late)
    assert not Policy(tiny_model(), warn=said.append).shares_prompts
    (warning,) = said
    assert "the fast path's logits (prompts) differ" in warning


def wrong_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "step_logits", backwards(decoders.step_logits))


def wrong_order_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    right = decoders.prepare_body
    monkeypatch.setattr(decoders, "prepare_body", lambda body: exchanged(right(body)))


def wrong_prompts_beside_running_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    right = decoders.prepared_layer_run
    monkeypatch.setattr(
        decoders, "prepared_layer_run", lambda body, linear: right(body, exchanged(linear))
    )


def not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    right = decoders.step_logits
    monkeypatch.setattr(decoders, "step_logits", lambda *given: right(*given) * torch.nan)


@pytest.mark.parametrize(
    "mistake",
    [wrong_step, wrong_order_of_weights, wrong_prompts_beside_running_rows, not_a_number],
)
def test_decoding_that_is_wrong_is_not_used_and_results_are_the_same(
    mistake: Callable[[pytest.MonkeyPatch], None],
    policy: Policy,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
):
    request = SampleRequest(
        id="one", token_ids=(7, 8, 9), num_completions=3, max_tokens=8, key=(1,)
    )
    tokenizer = character_tokenizer()
    expected = complete(build_sampler(policy, tokenizer, max_rows=4), [request])
    mistake(monkeypatch)
    sampler = build_sampler(policy, tokenizer, max_rows=4)
    assert policy.shares_prompts  # training is right
    (warning,) = said
    assert "the fast path's logits (decoding) differ from the model's own by" in warning
    assert warning.endswith("the model decodes by its own forward: same results, slower")
    found = complete(sampler, [request])
    drawn = [[list(c.token_ids) for c in answers["one"]] for answers in (found, expected)]
    assert drawn[0] == drawn[1]


def test_steps_over_fixed_buffers_are_checked_where_they_are_what_decodes(
    policy: Policy, said: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine, "capture_for", lambda device: lambda step, rows: lambda: step(rows))
    assert isinstance(build_decoder(policy, max_rows=4), LlamaDecoder) and not said
    monkeypatch.setattr(graphed, "step_logits", backwards(graphed.step_logits))
    assert isinstance(build_decoder(policy, max_rows=4), TransformersDecoder)
    (warning,) = said
    assert "the fast path's logits (decoding) differ" in warning


@pytest.mark.real_model
def test_smollm2s_exchanged_layers_are_told_from_rounding():
    try:
        model_folder("smollm2-135m")
    except ModelError as error:
        pytest.skip(str(error))
    checks = (
        (extended_difference, LARGEST_LOGIT_DIFFERENCE[torch.bfloat16]),
        (scored_difference, LARGEST_OVER_POSITIONS[torch.bfloat16]),
        (decoded_difference, LARGEST_OVER_POSITIONS[torch.bfloat16]),
    )
    body = load_policy("smollm2-135m", device="cpu", dtype="bf16").body
    for measure, allowed in checks:
        assert measure(body) < allowed / 2
    # The middle ones, which are most alike: others in each other's place are farther off.
    layers = list(body.layers)
    layers[14], layers[15] = layers[15], layers[14]
    body.layers = layers
    for measure, allowed in checks:
        assert measure(body) > 1.2 * allowed
