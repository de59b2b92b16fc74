"""Geometric mixtures of two policies, and the choice among completions: values and properties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.models import character_tokenizer, save_tiny, tiny_model
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from gmpo.config import ModelConfig
from gmpo.decoding import (
    GeometricMixtureProcessor,
    MixtureDecoder,
    MixtureWeights,
    best_of_draws,
    best_rollout,
    mixture_logits,
    require_same_vocabulary,
    token_probability,
)
from gmpo.errors import ConfigError, DataError, ModelError, NonFiniteError
from gmpo.generation import GenerationSettings, generate
from gmpo.outcomes import Mix
from gmpo.policy.llama import LlamaBody
from gmpo.records import Group, Prompt, Rollout
from gmpo.rollouts import SamplingSettings
from gmpo.sampler.decoders import Decoder, LlamaDecoder, TransformersDecoder
from gmpo.sampler.local import LocalSampler
from gmpo.sampler.requests import SampleRequest, complete

F64 = torch.float64
HALF = MixtureWeights(first=0.5, second=0.5)


def mixture(first: Tensor, second: Tensor, weights: MixtureWeights = HALF) -> Tensor:
    return mixture_logits(first_logits=first, second_logits=second, weights=weights)


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=F64).log()


# What the article does


def adjust_probabilities_geometric(logits: Tensor, epsilon: float = 1e-8) -> Tensor:
    """The article's method, line by line."""
    probs = torch.softmax(logits, dim=-1)
    log_probs = torch.log(probs + epsilon)
    geometric_log_mean = torch.mean(log_probs, dim=-1, keepdim=True)
    return torch.softmax(log_probs - geometric_log_mean, dim=-1)


def test_the_articles_adjustment_changes_nothing():
    # Subtracting one number from all log-probabilities: softmax(log p - c) = p.
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0), dtype=F64) * 3
    probs = logits.softmax(dim=-1)
    torch.testing.assert_close(adjust_probabilities_geometric(logits, epsilon=0.0), probs)
    # Its epsilon only mixes in uniform noise, (p + e) / (1 + V e): no order changes, and the
    # total moved is below V e = 1e-5.
    with_epsilon = adjust_probabilities_geometric(logits)
    torch.testing.assert_close(with_epsilon, (probs + 1e-8) / (1 + 1000 * 1e-8))
    assert torch.equal(with_epsilon.argsort(dim=-1), probs.argsort(dim=-1))
    assert float((with_epsilon - probs).abs().sum(dim=-1).amax()) / 2 < 1e-5


# The mixture


def test_a_mixture_by_hand():
    # sqrt(0.8 * 0.2) = 0.4 and sqrt(0.2 * 0.8) = 0.4: equal, so 1/2 each.
    even = mixture(logits_of(0.8, 0.2), logits_of(0.2, 0.8)).softmax(dim=-1)
    torch.testing.assert_close(even, torch.tensor([0.5, 0.5], dtype=F64))
    # 0.5^0.25 * 0.9^0.75 = 0.7770, 0.5^0.25 * 0.1^0.75 = 0.1495; of their sum 0.8386 and 0.1614:
    # the common factor 0.5^0.25 falls out, and the odds are 9^0.75 = 5.1962.
    weights = MixtureWeights(first=0.25, second=0.75)
    uneven = mixture(logits_of(0.5, 0.5), logits_of(0.9, 0.1), weights).softmax(dim=-1)
    odds = 9**0.75
    torch.testing.assert_close(uneven, torch.tensor([odds / (1 + odds), 1 / (1 + odds)], dtype=F64))


def test_a_weight_of_one_is_that_policy_bit_for_bit():
    first, second = torch.randn(3, 7), torch.randn(3, 7)
    assert mixture(first, second, MixtureWeights(first=1, second=0)) is first
    assert mixture(first, second, MixtureWeights(first=0, second=1)) is second


def test_a_policy_of_weight_zero_rules_nothing_out():
    ruled_out = torch.tensor([0.0, -math.inf])
    weights = MixtureWeights(first=2.0, second=0.0)
    mixed = mixture(torch.tensor([1.0, 1.0]), ruled_out, weights)
    torch.testing.assert_close(mixed.softmax(dim=-1), torch.tensor([0.5, 0.5]))
    half = mixture(torch.tensor([1.0, 1.0]), ruled_out).softmax(dim=-1)
    assert half.tolist() == [1.0, 0.0]


rows = st.lists(st.floats(-20, 20), min_size=2, max_size=6)


@given(first=rows, seed=st.integers(0, 1000), share=st.floats(0.01, 0.99), shift=st.floats(-9, 9))
def test_mixtures_are_distributions_between_their_policies(
    first: list[float], seed: int, share: float, shift: float
):
    one = torch.tensor(first, dtype=F64)
    other = torch.randn(len(first), generator=torch.Generator().manual_seed(seed), dtype=F64) * 5
    weights = MixtureWeights(first=1 - share, second=share)
    mixed = mixture(one, other, weights)
    # Shifted logits are the same policy; swapped policies with swapped weights the same mixture.
    swapped = MixtureWeights(first=share, second=1 - share)
    torch.testing.assert_close(mixed, mixture(one + shift, other, weights))
    torch.testing.assert_close(mixed, mixture(other, one, swapped))
    # A policy mixed with itself is itself.
    torch.testing.assert_close(mixture(one, one, weights).softmax(-1), one.softmax(-1))
    # The log-odds of any two tokens lie between those of the two policies.
    odds, low, high = (x[0] - x[1] for x in (mixed, one, other))
    assert min(low, high) - 1e-9 <= odds <= max(low, high) + 1e-9


@pytest.mark.parametrize("bad", [(-0.1, 1.1), (0.0, 0.0), (math.nan, 1.0), (math.inf, 0.0)])
def test_bad_weights_are_refused(bad: tuple[float, float]):
    with pytest.raises(ConfigError, match="0 or more, and not both 0"):
        MixtureWeights(first=bad[0], second=bad[1])


def test_policies_over_different_vocabularies_are_refused():
    with pytest.raises(ModelError, match=r"shapes \(2, 5\) and \(2, 6\)"):
        mixture(torch.zeros(2, 5), torch.zeros(2, 6))
    larger = character_tokenizer()
    larger.add_tokens(["<new>"])
    require_same_vocabulary(character_tokenizer(), character_tokenizer())
    with pytest.raises(
        ModelError, match=r"1 tokens differ, e\.g\. '<new>' is id None in the first"
    ):
        require_same_vocabulary(character_tokenizer(), larger)


# In the project's sampler


def decoder(model: PreTrainedModel, engine: str) -> Decoder:
    if engine == "llama":
        return LlamaDecoder(LlamaBody(model), max_rows=4)
    return TransformersDecoder(model)


def drawn(decoder: Decoder) -> dict[str, list[list[int]]]:
    """Completions of different lengths, more than there are rows, so that rows move."""
    sampler = LocalSampler(decoder, context_length=256, max_rows=4)
    requests = [
        SampleRequest(
            id=str(n), token_ids=[5 + n, 30, 12], num_completions=3, max_tokens=3 + 2 * n, key=(n,)
        )
        for n in range(3)
    ]
    finished = complete(sampler, requests)
    return {name: [one.token_ids.tolist() for one in of_one] for name, of_one in finished.items()}


@torch.no_grad()
def reference_draw(
    models: tuple[PreTrainedModel, PreTrainedModel], prompt: list[int], drawn_ids: list[int]
) -> Tensor:
    """log-probabilities of drawn tokens under the mixture, from whole forwards without a cache."""
    token_ids = torch.tensor([prompt + drawn_ids])
    first, second = (model(token_ids, use_cache=False).logits[0] for model in models)
    mixed = mixture(first, second)[len(prompt) - 1 : -1].log_softmax(dim=-1)
    return mixed.gather(-1, torch.tensor(drawn_ids)[:, None])[:, 0]


@pytest.mark.parametrize("engines", [("llama", "llama"), ("llama", "transformers")])
def test_rows_of_a_mixture_follow_their_own_prompts(engines: tuple[str, str]):
    # The two decoders reorder rows differently when some end; each row must stay with itself.
    models = tiny_model(dtype=F64), tiny_model(dtype=F64, seed=1)
    mixed = MixtureDecoder(*map(decoder, models, engines), weights=HALF)
    sampler = LocalSampler(mixed, context_length=256, max_rows=4)
    request = SampleRequest(
        id="r", token_ids=[7, 30, 12], num_completions=9, max_tokens=8, key=(1,)
    )
    stopping = SampleRequest(
        id="s",
        token_ids=[8, 9],
        num_completions=9,
        max_tokens=9,
        key=(2,),
        stop_ids=tuple(range(40)),
    )
    finished = complete(sampler, [request, stopping])
    for asked in (request, stopping):
        for one in finished[asked.id]:
            expected = reference_draw(models, list(asked.token_ids), one.token_ids.tolist())
            # transformers' modules take norm statistics in fp32.
            np.testing.assert_allclose(one.logprobs, expected.numpy(), atol=2e-5)


def test_a_mixture_with_weight_one_draws_what_that_policy_draws():
    models = tiny_model(dtype=F64), tiny_model(dtype=F64, seed=1)
    alone = [drawn(decoder(model, "llama")) for model in models]
    assert alone[0] != alone[1]
    for expected, weights in zip(alone, ((1, 0), (0, 1)), strict=True):
        both = [decoder(model, "llama") for model in models]
        exact = MixtureWeights(first=weights[0], second=weights[1])
        assert drawn(MixtureDecoder(*both, weights=exact)) == expected
    assert drawn(MixtureDecoder(*[decoder(m, "llama") for m in models], weights=HALF)) not in alone


def test_policies_that_share_no_token_cannot_be_drawn_from():
    nothing = mixture(torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]]))
    from gmpo.sampler.drawing import draw_tokens

    with pytest.raises(NonFiniteError, match="no token can be drawn"):
        draw_tokens(
            nothing,
            uniforms=torch.tensor([0.5]),
            temperature=torch.tensor([1.0]),
            top_p=torch.tensor([1.0]),
            top_k=torch.tensor([0]),
        )


def test_a_mixture_takes_no_weights():
    both = [decoder(tiny_model(), "llama") for _ in range(2)]
    with pytest.raises(ConfigError, match="takes none"):
        MixtureDecoder(*both, weights=HALF).load_weights([])


# In transformers' generate


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_processor_gives_the_mixture_inside_generate(num_beams: int):
    models = tiny_model(dtype=F64), tiny_model("gpt2", dtype=F64, seed=1)
    processor = GeometricMixtureProcessor(models[1], weights=HALF, pad_token_id=0)
    prompts = torch.tensor([[7, 30, 12], [0, 8, 9]])
    mask = (prompts != 0).long()
    with torch.no_grad():
        ids = models[0].generate(
            prompts,
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            num_beams=num_beams,
            logits_processor=LogitsProcessorList([processor]),
            pad_token_id=0,
            eos_token_id=None,
        )
    if num_beams > 1:
        # Beams change places between steps; the other model must read each row anew then.
        fresh = GeometricMixtureProcessor(models[1], weights=HALF, pad_token_id=0)
        scores = torch.zeros(2, 105, dtype=F64)[:, : models[0].config.vocab_size]
        kept = processor(ids, scores)
        torch.testing.assert_close(kept, fresh(ids, scores))
        return
    for row, start in ((0, 0), (1, 1)):
        text = ids[row, start:].tolist()
        for length in range(3 - start, len(text)):
            with torch.no_grad():
                first, second = (m(torch.tensor([text[:length]])).logits[0, -1] for m in models)
            assert int(mixture(first, second).argmax()) == text[length]


def test_the_processor_of_weight_one_changes_nothing():
    other = tiny_model(seed=1)
    scores = torch.randn(1, other.config.vocab_size)
    processor = GeometricMixtureProcessor(other, weights=MixtureWeights(first=1, second=0))
    assert processor(torch.tensor([[7, 8]]), scores) is scores


# Best of n


def rollout(index: int, logprobs: list[float], **fields: object) -> Rollout:
    settings: dict[str, object] = {
        "prompt_id": "p",
        "index": index,
        "token_ids": np.arange(len(logprobs)),
        "from_policy": np.ones(len(logprobs), dtype=np.bool_),
        "sampler_logprobs": np.array(logprobs),
        "text": "",
        "finish_reason": "stop",
        "first_version": 0,
        "last_version": 0,
        **fields,
    }
    return Rollout(**settings)  # type: ignore[arg-type]


def test_the_token_probability_is_the_geometric_mean():
    # (0.9 * 0.4)^(1/2) = 0.6.
    assert token_probability(np.log([0.9, 0.4])) == pytest.approx(0.6)
    with pytest.raises(DataError, match="without counted tokens"):
        token_probability(np.zeros(0))


def test_the_best_rollout_has_the_largest_mean_over_its_counted_tokens():
    longer = rollout(0, [-0.2, -0.2, -0.2])  # sum -0.6, mean -0.2
    shorter = rollout(1, [-0.5])  # sum -0.5, mean -0.5: not better for being short
    tool = rollout(2, [-0.1, -9.0], from_policy=np.array([True, False]))  # counted mean -0.1
    failed = rollout(3, [0.0], error="the tool broke")
    prompt = Prompt(id="p", text="?")
    assert best_rollout(Group(prompt=prompt, rollouts=(longer, shorter))) is longer
    assert best_rollout(Group(prompt=prompt, rollouts=(longer, shorter, tool, failed))) is tool
    assert best_rollout(Group(prompt=prompt, rollouts=(shorter,))) is shorter
    with pytest.raises(DataError, match="none of the 1 rollouts of prompt 'p'"):
        best_rollout(Group(prompt=prompt, rollouts=(failed,)))


def test_the_best_of_each_block_of_draws_is_kept():
    failed = {"error": "the tool broke"}
    drawn = [
        *(rollout(0, [-0.5]), rollout(1, [-0.1]), rollout(2, [-0.2])),
        *(rollout(3, [0.0], **failed), rollout(4, [-0.3]), rollout(5, [-0.4])),
        *(rollout(6, [], **failed), rollout(7, []), rollout(8, [0.0], **failed)),
    ]
    counts: list[int] = []

    def sample(
        prompts: Sequence[Prompt], *, settings: SamplingSettings, key: tuple[int | str, ...]
    ) -> list[Group]:
        counts.append(settings.num_completions)
        assert key == ("k",)
        return [Group(prompt=prompt, rollouts=tuple(drawn)) for prompt in prompts]

    settings = SamplingSettings(num_completions=3, max_tokens=4, temperature=1.0, stop_ids=(1,))
    asked = {"settings": settings, "key": ("k",)}
    (group,) = best_of_draws(sample, count=3)([Prompt(id="p", text="?")], **asked)
    assert counts == [9]
    # Where nothing can be chosen from, the first is kept: it is graded like any other.
    assert [one.index for one in group.rollouts] == [1, 4, 6]
    assert best_of_draws(sample, count=1) is sample


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    paths = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    return save_tiny(paths[0]), save_tiny(paths[1], seed=1)


def texts(model: str, mix: Mix | None = None, **settings: object) -> list[str]:
    config = ModelConfig(name=model, device="cpu", dtype="fp32")
    asked = GenerationSettings(temperature=1.0, max_tokens=8, **settings)  # type: ignore[arg-type]
    return [one.text for one in generate(config, "abc", settings=asked, mix=mix)]


def test_best_of_one_is_a_sample_and_best_of_more_is_chosen_from_the_same_draws(
    folders: tuple[str, str],
):
    model, _ = folders
    plain = texts(model, num_completions=6)
    assert texts(model, num_completions=6, best_of=1) == plain
    config = ModelConfig(name=model, device="cpu", dtype="fp32")
    settings = GenerationSettings(temperature=1.0, max_tokens=8, num_completions=6)
    draws = generate(config, "abc", settings=settings)
    best = [max(draws[n : n + 3], key=lambda one: one.mean_logprob).text for n in (0, 3)]
    assert texts(model, num_completions=2, best_of=3) == best


def test_generating_from_a_mixture(folders: tuple[str, str]):
    first, second = folders
    assert texts(first, Mix(name=second, weight=0.0)) == texts(first)
    assert texts(first, Mix(name=second, weight=1.0)) == texts(second)
    assert texts(first, Mix(name=second)) == texts(second, Mix(name=first))


def test_what_generate_refuses(folders: tuple[str, str], tmp_path: Path):
    first, second = folders
    with pytest.raises(ConfigError, match=r"weight of the second model is 1\.5"):
        texts(first, Mix(name=second, weight=1.5))
    with pytest.raises(ConfigError, match="best_of is 0"):
        texts(first, best_of=0)
    greedy = GenerationSettings(temperature=0.0, best_of=2)
    with pytest.raises(ConfigError, match="greedy draws are all alike"):
        generate(ModelConfig(name=first), "abc", settings=greedy)
    other = character_tokenizer()
    other.add_tokens(["<new>"])
    model = tiny_model()
    model.resize_token_embeddings(len(other))
    model.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="different vocabularies: 1 tokens differ"):
        texts(first, Mix(name=str(tmp_path)))
