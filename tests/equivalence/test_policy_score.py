"""Scores and gradients must agree: fast and plain, padded and not, whole and in parts."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.models import FAMILIES, tiny_model
from tests.rollout_groups import group, one_step, random_groups, rollout
from torch import Tensor
from transformers import PreTrainedModel

from gmpo.batch import MicroBatch
from gmpo.errors import ModelError
from gmpo.policy import packed
from gmpo.policy.prefix import common_length
from gmpo.policy.score import Policy
from gmpo.records import Group

F64 = torch.float64
LLAMA_FAMILY = [name for name in FAMILIES if name != "gpt2"]
# The modules of transformers take RMS-norm statistics in fp32 even in an fp64 model and gmpo's
# layers take them in fp64, so the two paths agree to fp32's rounding. Within a path: 1e-12.
ACROSS_PATHS = 1e-5
WITHIN_PATH = 1e-12
llama_families = pytest.mark.parametrize("family", LLAMA_FAMILY)

COMMON = [11, 12, 13, 14, 15, 16]
PROMPTS = {
    "nothing in common": [[20, 21, 22, 23, 24, 25], [30, 31, 32], [40, 41, 42, 43, 44]],
    "one token in common": [[11, 21, 22, 23, 24, 25], [11, 31, 32], [11, 41, 42, 43, 44]],
    "many tokens in common": [[*COMMON, 20, 21, 22], [*COMMON, 30], [*COMMON, 40, 41]],
    "one prompt is the others' beginning": [COMMON, [*COMMON, 30, 31], [*COMMON, 40]],
    "twice the same prompt": [COMMON, COMMON, [*COMMON, 40]],
    "a prompt of one token": [[11], [11, 12, 13, 14, 15, 16], [11, 12, 13, 14, 15]],
    "a single prompt": [[11, 12, 13, 14, 15]],
}
LENGTHS = [[5, 1, 3], [1, 1], [7, 2, 2, 4]]


@functools.cache
def shared_policy(family: str, engine: str, *, tied: bool = True) -> Policy:
    """Shared by tests that read its scores and clear its gradients."""
    return Policy(tiny_model(family, dtype=F64, tied=tied), engine=engine, warn=ignore)


def ignore(_: str) -> None:
    """Warnings are tested where they belong."""


def micro_batch(groups: Sequence[Group]) -> MicroBatch:
    width = max(len(each.rollouts) for each in groups)
    (batch,) = one_step(groups, [[1.0] * width for _ in groups]).micro_batches
    return batch


def batch_of(prompts: Sequence[Sequence[int]]) -> MicroBatch:
    return micro_batch(random_groups(prompts, LENGTHS[: len(prompts)]))


def token_weights(batch: MicroBatch) -> Tensor:
    """Another weight for every token; a token's weight depends on its row's name and its place."""
    rows = torch.tensor([sum(name.encode()) % 17 for name in batch.row_names])
    places = torch.arange(batch.mask.shape[1])
    weights = torch.sin(1.0 + rows[:, None] + 0.7 * places[None]).to(F64)
    return torch.where(batch.mask, weights, 0.0)


def gradients_of(policy: Policy, loss: Tensor) -> dict[str, Tensor]:
    weights = dict(policy.model.named_parameters())
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def weighted_gradients(
    policy: Policy, batch: MicroBatch, *, temperature: float = 1.0, with_entropy: bool = False
) -> dict[str, Tensor]:
    scores = policy.score(batch, temperature=temperature, with_entropy=with_entropy)
    loss = (token_weights(batch) * scores.logprobs).sum()
    if scores.entropy is not None:
        loss = loss + (token_weights(batch).flip(1) * scores.entropy).sum()
    return gradients_of(policy, loss)


def assert_gradients_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float
) -> None:
    """Relative to each weight's largest gradient."""
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-3).item()
        torch.testing.assert_close(
            actual[name],
            gradient,
            rtol=0,
            atol=tolerance * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@torch.no_grad()
def obvious_logprobs(model: PreTrainedModel, batch: MicroBatch) -> list[Tensor]:
    """Each row alone through the model's own forward, no padding and no cache."""
    results = []
    for row, prompt in enumerate(batch.prompt_of_row.tolist()):
        start = int(batch.prompt_lengths[prompt])
        drawn = batch.completion_ids[row, : int(batch.completion_lengths[row])]
        token_ids = torch.cat((batch.prompt_ids[prompt, :start], drawn))
        logprobs = model(token_ids[None]).logits[0].log_softmax(dim=-1)
        results.append(logprobs[start - 1 : -1].gather(-1, drawn[:, None])[:, 0])
    return results


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_each_row_alone_in_the_models_own_forward(family: str, engine: str):
    policy = shared_policy(family, engine)
    batch = batch_of(PROMPTS["many tokens in common"])
    scores = policy.score(batch)
    assert scores.entropy is None
    for row, expected in enumerate(obvious_logprobs(policy.model, batch)):
        actual = scores.logprobs[row, : len(expected)].detach()
        torch.testing.assert_close(actual, expected, rtol=0, atol=ACROSS_PATHS)


@llama_families
@pytest.mark.parametrize("prompts", ["many tokens in common", "nothing in common"])
def test_rows_attend_in_blocks_as_they_do_whole(
    family: str, prompts: str, monkeypatch: pytest.MonkeyPatch
):
    policy, batch = shared_policy(family, "fast"), batch_of(PROMPTS[prompts])
    whole = policy.score(batch).logprobs.detach(), weighted_gradients(policy, batch)
    monkeypatch.setattr(packed, "_QUERY_BLOCK", 2)
    generations = packed._generations(policy.body, batch)
    assert max(len(generation.blocks) for generation in generations) >= 3
    torch.testing.assert_close(policy.score(batch).logprobs, whole[0], rtol=0, atol=WITHIN_PATH)
    assert_gradients_close(weighted_gradients(policy, batch), whole[1], tolerance=WITHIN_PATH)


@llama_families
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_fast_and_plain_give_the_same_scores_and_gradients(family: str, tied: bool):
    fast = shared_policy(family, "fast", tied=tied)
    plain = shared_policy(family, "plain", tied=tied)
    assert fast.shares_prompts and not plain.shares_prompts
    assert len(list(fast.model.parameters())) == len(fast.masters)
    assert ("lm_head.weight" in fast.masters) == (not tied)
    batch = batch_of(PROMPTS["many tokens in common"])
    for temperature in (1.0, 0.7):
        own = fast.score(batch, temperature=temperature, with_entropy=True)
        theirs = plain.score(batch, temperature=temperature, with_entropy=True)
        torch.testing.assert_close(own.logprobs, theirs.logprobs, rtol=0, atol=ACROSS_PATHS)
        torch.testing.assert_close(own.entropy, theirs.entropy, rtol=0, atol=ACROSS_PATHS)
        assert_gradients_close(
            weighted_gradients(fast, batch, temperature=temperature, with_entropy=True),
            weighted_gradients(plain, batch, temperature=temperature, with_entropy=True),
            tolerance=10 * ACROSS_PATHS,
        )


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS.keys())
def test_fast_and_plain_agree_whatever_the_prompts_have_in_common(prompts: list[list[int]]):
    batch = batch_of(prompts)
    fast, plain = shared_policy("qwen3", "fast"), shared_policy("qwen3", "plain")
    torch.testing.assert_close(
        fast.score(batch).logprobs, plain.score(batch).logprobs, rtol=0, atol=ACROSS_PATHS
    )
    assert_gradients_close(
        weighted_gradients(fast, batch),
        weighted_gradients(plain, batch),
        tolerance=10 * ACROSS_PATHS,
    )


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("nothing in common", 0),
        ("one token in common", 0),  # too short to pay for a pass of its own
        ("many tokens in common", 6),
        ("one prompt is the others' beginning", 5),  # its last position is needed apart
        ("twice the same prompt", 5),
        ("a prompt of one token", 0),
        ("a single prompt", 0),
    ],
)
def test_the_common_beginning_stops_before_the_shortest_prompts_last_token(name: str, length: int):
    batch = batch_of(PROMPTS[name])
    assert common_length(batch.prompt_ids, batch.prompt_lengths) == length


def test_running_the_common_beginning_once_changes_neither_scores_nor_gradients():
    policy = shared_policy("llama", "fast")
    groups = random_groups(PROMPTS["many tokens in common"], LENGTHS)
    whole = micro_batch(groups)
    together = weighted_gradients(policy, whole)
    apart: dict[str, Tensor] = {}
    for each in groups:  # one prompt alone shares nothing
        for name, gradient in weighted_gradients(policy, micro_batch([each])).items():
            apart[name] = apart.get(name, torch.zeros_like(gradient)) + gradient
    assert_gradients_close(together, apart, tolerance=WITHIN_PATH)


@llama_families
def test_no_gradient_depends_on_which_thread_comes_first(family: str):
    # What brackets took is given back by atomic additions: right, and each time otherwise rounded.
    logprobs = (
        shared_policy(family, "fast").score(batch_of(PROMPTS["many tokens in common"])).logprobs
    )
    passes = {node.name() for node in nodes_before(logprobs.grad_fn)}
    assert "IndexSelectBackward0" in passes
    assert not {name for name in passes if name.startswith(("IndexBackward", "IndexPutBackward"))}


def nodes_before(last: Any) -> Iterator[Any]:
    """Every node of the graph that ends in one."""
    seen, waiting = set(), [last]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [before for before, _ in node.next_functions]


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_shared_prompts_gradient_is_the_sum_over_its_completions(family: str, engine: str):
    policy = shared_policy(family, engine)
    (whole,) = random_groups([[11, 12, 13, 14, 15]], [[4, 2, 1, 6]])
    together = weighted_gradients(policy, micro_batch([whole]))
    total: dict[str, Tensor] = {}
    for one in whole.rollouts:
        alone = weighted_gradients(policy, micro_batch([replace(whole, rollouts=(one,))]))
        for name, gradient in alone.items():
            total[name] = total.get(name, torch.zeros_like(gradient)) + gradient
    tolerance = WITHIN_PATH if engine == "fast" else ACROSS_PATHS
    assert_gradients_close(together, total, tolerance=tolerance)


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("max_tokens", [1, 25, 40, 60])
def test_the_cut_into_micro_batches_does_not_matter(engine: str, max_tokens: int):
    # gpt2's own layers compute in fp64 throughout, so its plain path is exact as well.
    policy = shared_policy("llama" if engine == "fast" else "gpt2", engine)
    groups = random_groups(PROMPTS["one prompt is the others' beginning"], LENGTHS)
    (whole,) = one_step(groups, [[1.0] * 4] * 3).micro_batches
    parts = one_step(groups, [[1.0] * 4] * 3, max_tokens=max_tokens).micro_batches
    sizes = [len(part.row_names) for part in parts]
    assert sum(sizes) == 9 and len(sizes) > 1
    total: dict[str, Tensor] = {}
    expected = policy.score(whole).logprobs
    places = {name: row for row, name in enumerate(whole.row_names)}
    for part in parts:
        scores = policy.score(part).logprobs
        for row, name in enumerate(part.row_names):
            count = int(part.completion_lengths[row])
            torch.testing.assert_close(
                scores[row, :count], expected[places[name], :count], rtol=0, atol=WITHIN_PATH
            )
        for name, gradient in weighted_gradients(policy, part).items():
            total[name] = total.get(name, torch.zeros_like(gradient)) + gradient
    assert_gradients_close(total, weighted_gradients(policy, whole), tolerance=WITHIN_PATH)


def padded_further(batch: MicroBatch, *, filler: int) -> MicroBatch:
    """The same rows with wider tables and another token id in every padded place."""
    rows, width = batch.completion_ids.shape
    completion_ids = torch.full((rows, width + 3), filler)
    mask = torch.zeros(rows, width + 3, dtype=torch.bool)
    mask[:, :width] = batch.mask
    for row, count in enumerate(batch.completion_lengths.tolist()):
        completion_ids[row, :count] = batch.completion_ids[row, :count]
    prompt_ids = torch.full((len(batch.prompt_ids), batch.prompt_ids.shape[1] + 5), filler)
    for row, count in enumerate(batch.prompt_lengths.tolist()):
        prompt_ids[row, :count] = batch.prompt_ids[row, :count]
    wider = torch.zeros(rows, width + 3, dtype=F64)
    return replace(
        batch,
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        mask=mask,
        sampler_logprobs=wider,
        old_logprobs=wider,
    )


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("name", ["nothing in common", "one prompt is the others' beginning"])
def test_padding_has_no_effect(engine: str, name: str):
    policy = shared_policy("llama" if engine == "fast" else "gpt2", engine)
    batch = batch_of(PROMPTS[name])
    wider = padded_further(batch, filler=99)
    width = batch.mask.shape[1]
    scores = policy.score(wider).logprobs
    assert not scores[:, width:].any()
    torch.testing.assert_close(
        scores[:, :width], policy.score(batch).logprobs, rtol=0, atol=WITHIN_PATH
    )
    assert_gradients_close(
        weighted_gradients(policy, wider), weighted_gradients(policy, batch), tolerance=WITHIN_PATH
    )


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_tool_tokens_are_read_but_not_scored(engine: str):
    policy = shared_policy("qwen2", engine)
    tokens = [40, 41, 42, 43, 44, 45]
    from_policy = [True, True, False, False, True, False]
    whole = rollout(tokens, index=0)
    mixed = rollout(tokens, index=1, from_policy=from_policy)
    batch = micro_batch([group([11, 12, 13], [whole, mixed])])
    scores = policy.score(batch, with_entropy=True)
    full, partial = scores.logprobs[0], scores.logprobs[1]
    counted = torch.tensor(from_policy)
    torch.testing.assert_close(partial[counted], full[counted], rtol=0, atol=ACROSS_PATHS)
    assert not partial[~counted].any()
    assert scores.entropy is not None and not scores.entropy[1][~counted].any()
    # Another tool answer changes what follows it, and nothing before.
    other = rollout([40, 41, 70, 71, 44, 45], index=1, from_policy=from_policy)
    changed = policy.score(micro_batch([group([11, 12, 13], [whole, other])])).logprobs[1]
    torch.testing.assert_close(changed[:2], partial[:2], rtol=0, atol=ACROSS_PATHS)
    assert (changed[4] - partial[4]).abs() > 1e-3


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_completions_of_one_token_are_scored_from_the_prompt_alone(engine: str):
    policy = shared_policy("llama", engine)
    batch = micro_batch(random_groups([[11], [20, 21, 22]], [[1, 1], [1]]))
    scores = policy.score(batch).logprobs
    expected = torch.stack(obvious_logprobs(policy.model, batch))
    torch.testing.assert_close(scores, expected, rtol=0, atol=ACROSS_PATHS)


def test_gpt2_takes_the_plain_path_with_one_warning():
    warnings: list[str] = []
    policy = Policy(tiny_model("gpt2"), engine="fast", warn=warnings.append)
    assert not policy.shares_prompts
    (warning,) = warnings
    assert "model type 'gpt2' is not one of llama" in warning
    assert "runs on the plain path" in warning


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
@llama_families
def test_a_llama_family_model_takes_the_fast_path_without_a_warning(
    family: str, dtype: torch.dtype
):
    warnings: list[str] = []
    policy = Policy(tiny_model(family, dtype=dtype), engine="fast", warn=warnings.append)
    assert (policy.shares_prompts, warnings) == (True, [])


def test_a_model_whose_layers_differ_from_the_familys_falls_back_with_the_difference():
    warnings: list[str] = []
    model = tiny_model("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda module, given, output: 1.5 * output)
    policy = Policy(model, engine="fast", warn=warnings.append)
    assert not policy.shares_prompts
    assert "logits (prompts) differ from the model's own by" in warnings[0]


def test_a_sliding_window_is_refused_by_the_fast_path_with_its_width():
    model = tiny_model("mistral")
    model.config.sliding_window = 16
    warnings: list[str] = []
    Policy(model, engine="fast", warn=warnings.append)
    assert "sliding window of 16 tokens" in warnings[0]


def test_the_plain_engine_is_taken_without_a_warning():
    warnings: list[str] = []
    assert not Policy(tiny_model(), engine="plain", warn=warnings.append).shares_prompts
    assert warnings == []


def test_weights_of_another_model_or_shape_are_refused_and_nothing_is_loaded():
    policy = Policy(tiny_model(), warn=ignore)
    before = {name: weight.clone() for name, weight in policy.named_weights()}
    with pytest.raises(ModelError, match=r"weights are of another model: \d+ names differ"):
        policy.load_weights(tiny_model("gpt2").named_parameters())
    name = "model.norm.weight"
    wrong = {**{name: weight + 1 for name, weight in before.items()}, name: torch.zeros(7)}
    with pytest.raises(ModelError, match=r"model.norm.weight has shape \(7,\), this model needs"):
        policy.load_weights(wrong.items())
    for name, weight in policy.named_weights():
        assert torch.equal(weight, before[name]), name


def test_named_weights_carry_a_policy_over_exactly():
    source, target = Policy(tiny_model(seed=1), warn=ignore), Policy(tiny_model(), warn=ignore)
    batch = batch_of(PROMPTS["a single prompt"])
    target.load_weights(source.named_weights())
    assert torch.equal(source.score(batch).logprobs, target.score(batch).logprobs)
