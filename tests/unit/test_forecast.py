"""What memory a run will need, by hand for the tiny model; what cannot fit and what would."""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import character_tokenizer, save_tiny, tiny_model
from tests.tiny_runs import tiny_recipe
from transformers import AutoModelForCausalLM

from gmpo.config import RunConfig
from gmpo.errors import ConfigError, DataError, ModelError
from gmpo.forecast import Forecast, forecast, forecast_inputs
from gmpo.headroom import free_bytes, refusal_beyond_memory, require_memory
from gmpo.inputs import Given, RunInputs, read_inputs
from gmpo.kernels.library import kernels_off
from gmpo.policy.lora import adapters_of
from gmpo.sampler.prepared import order_of

GIB = 2**30


@pytest.fixture(autouse=True)
def torchs_operations() -> Iterator[None]:
    """The figures by hand are theirs; what compiled functions hold stands in test_memory.py."""
    with kernels_off():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


def test_the_forecast_is_the_one_by_hand(model: str):
    needs = forecast(tiny_recipe(model))
    # Embedding, tied to the head: 101 x 32 = 3,232. A layer: queries and output 2 x 32 x 32, keys
    # and values 2 x 32 x 16, feed-forward 3 x 32 x 48, norms 2 x 32: 7,744. Last norm: 32.
    assert needs.num_parameters == 3_232 + 2 * 7_744 + 32 == 18_752
    assert needs.train_items == 17  # 10 unordered pairs, most of them in both orders
    assert needs.held_out_items == 5
    assert needs.longest_prompt_tokens == 17  # "What is 4 + 4?" and three chat tokens
    assert needs.completion_tokens_per_round == 8 * 8 * 3
    assert needs.prompt_tokens_per_round == 8 * 17
    assert needs.optimizer_steps == 2 * 4
    # fp32 weight, gradient, two moments: 16 bytes
    assert needs.weights_gib == 18_752 * 16 / GIB
    # 8 prompts of 17 tokens and 64 rows of 3, each rounded up to 32; keys and values of 2 heads x 8
    # in 2 layers
    assert needs.cache_gib == (8 * 32 + 64 * 32) * 2 * 16 * 2 * 4 / GIB
    # the cache again while it grows, 2,048 prompt tokens in two parts and joined, two tables of
    # logits, where they are laid out for decoding the linear layers and the head, and which of 17
    # tokens each may see: once, and for two query heads a key head as a truth and in fp32
    laid_out = 2 * (7_744 - 64) + 3_232 if order_of(torch.float32, "cpu") else 0
    masks = 2048 * 17 * (1 + 2 * (1 + 4)) / 4
    moment = 2 * 2048 * 2 * 16 * 2 + 2 * 64 * 101 + laid_out + masks
    assert needs.sampling_gib == pytest.approx(needs.cache_gib + moment * 4 / GIB, rel=1e-12)
    # A step's 2 groups: 2 x 17 + 16 x 2 tokens of 5 x 32 + 2 x 48 + 4 + 2 numbers a layer; keys and
    # values of what rows see, 16 x 19, and of all tokens
    layer = 66 * 262 + (304 + 66) * 32
    # for both heads of a key head: 16 rows of 2 tokens that see 19, 2 prompts of 17 that see 17
    masks = 2 * (16 * 2 * 19 + 2 * 17 * 17)
    # two tables of 48 logits, the gradients of 48 hidden states and of the head
    head = 2 * 48 * 101 + 48 * 32 + 101 * 32
    assert needs.update_gib == (2 * layer + masks + head) * 4 / GIB
    # 64 rollouts of 3 tokens: 2,500 bytes each and 17 a token, and 27 a token in tensors
    assert needs.rollouts_gib == 64 * (2500 + 3 * (17 + 27)) / GIB
    stays = needs.process_gib + needs.weights_gib + needs.cache_gib + needs.rollouts_gib
    assert needs.peak_gib == pytest.approx(stays + needs.sampling_gib)
    assert needs.process_gib > 0.1


def test_the_larger_of_what_stays_for_a_moment_makes_the_peak(model: str):
    long = forecast(tiny_recipe(model, sampling__max_new_tokens=40, sampling__max_rows=2))
    assert long.update_gib > long.sampling_gib
    stays = long.process_gib + long.weights_gib + long.cache_gib + long.rollouts_gib
    assert long.peak_gib == pytest.approx(stays + long.update_gib)


def test_what_adds_copies_of_the_weights_adds_memory(model: str):
    plain = forecast(tiny_recipe(model)).weights_gib
    with_reference = forecast(tiny_recipe(model, objective={"kl_coefficient": 0.1})).weights_gib
    with_cosine = forecast(tiny_recipe(model, training__gradient_cosine_every=2)).weights_gib
    never = forecast(tiny_recipe(model, training__gradient_cosine_every=3)).weights_gib
    assert never == plain
    assert with_reference == with_cosine == plain * 20 / 16
    assert forecast(tiny_recipe(model, training__kl_ref_every=2)).weights_gib == with_reference
    assert forecast(tiny_recipe(model, training__kl_ref_every=3)).weights_gib == plain
    narrow = forecast(tiny_recipe(model, model__dtype="bf16")).weights_gib
    assert narrow == plain * 18 / 16  # the compute copy


def test_adapters_alone_are_trained_and_the_rest_is_frozen(model: str):
    # Rank 2 on a layer's q and o (32 + 32), k and v (32 + 16), gate, up and down (32 + 48 each)
    adapters = 2 * 2 * (2 * 64 + 2 * 48 + 3 * 80)
    needs = forecast(tiny_recipe(model, lora={"rank": 2}))
    assert (needs.num_parameters, needs.trained_parameters) == (18_752, adapters)
    assert needs.weights_gib == (18_752 * 4 + adapters * 16) / GIB
    with_reference = tiny_recipe(model, lora={"rank": 2}, objective={"kl_coefficient": 0.1})
    assert forecast(with_reference).weights_gib == needs.weights_gib
    # Layers keep the same for their adapters; the head's gradient is not formed.
    head = 18_752 - 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) - 32
    whole = forecast(tiny_recipe(model))
    assert whole.update_gib - needs.update_gib == pytest.approx(head * 4 / GIB)
    few = {"lora": {"rank": 2, "targets": ["q_proj"]}}
    assert forecast(tiny_recipe(model, **few)).trained_parameters == 2 * 2 * 64
    assert forecast(tiny_recipe(model, **few)).update_gib == needs.update_gib
    # Operations of the plain engine each keep their own inputs, where those are needed.
    plain = {"training__engine": "plain"}
    all_in_plain = forecast(tiny_recipe(model, lora={"rank": 2}, **plain)).update_gib
    assert forecast(tiny_recipe(model, **few, **plain)).update_gib < all_in_plain


def test_layers_that_run_again_keep_less(model: str):
    long = {"sampling__max_new_tokens": 40}
    kept = forecast(tiny_recipe(model, **long))
    again = forecast(tiny_recipe(model, training__gradient_checkpointing=True, **long))
    assert again.update_gib < 0.85 * kept.update_gib
    assert again.weights_gib == kept.weights_gib


def test_a_refilled_round_may_take_every_prompt_it_is_allowed(model: str):
    refilled = forecast(
        tiny_recipe(model, sampling__dynamic="refill", sampling__max_extra_prompts=5)
    )
    assert refilled.completion_tokens_per_round == (8 + 5) * 8 * 3
    assert refilled.prompt_tokens_per_round == (8 + 5) * 17
    assert refilled.rollouts_gib == (8 + 5) * 8 * (2500 + 3 * (17 + 27)) / GIB


def test_a_rollout_function_may_fill_what_is_left_of_the_length(model: str):
    function = {"sampling__rollout": "tools:rollout", "sampling__max_length": 200}
    usual, own = forecast(tiny_recipe(model)), forecast(tiny_recipe(model, **function))
    # 64 prompts of 200 tokens, rounded up to 224, 64 rows of 3, up to 32; 256 bytes a position
    assert own.cache_gib == (64 * 224 + 64 * 32) * 256 / GIB
    assert own.completion_tokens_per_round == 8 * 8 * (200 - 17)
    assert own.update_gib > usual.update_gib


def given(model: str, **changes: Any) -> RunInputs:
    """The tiny recipe, its model in memory and without a name that could be loaded."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    config = tiny_recipe("given", **changes)
    return read_inputs(config, given=Given(model=loaded, tokenizer=character_tokenizer()))


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 2}}], ids=["all weights", "adapters"])
def test_a_given_model_is_there_already(model: str, changes: dict[str, Any]):
    inputs = given(model, **changes)
    needs, named = forecast_inputs(inputs), forecast(tiny_recipe(model, **changes))
    assert needs.num_parameters == named.num_parameters == 18_752
    assert needs.trained_parameters == named.trained_parameters
    assert needs.weights_gib == named.weights_gib
    assert (needs.loaded_gib, named.loaded_gib) == (18_752 * 4 / GIB, 0)
    assert needs.wanted_gib == pytest.approx(named.wanted_gib - needs.loaded_gib)
    assert inputs.given.model is not None
    assert not adapters_of(inputs.given.model)  # looking at it changes nothing
    copied = replace(inputs, given=replace(inputs.given, reference=deepcopy(inputs.given.model)))
    assert forecast_inputs(copied).loaded_gib == min(2 * needs.loaded_gib, needs.weights_gib)


def test_gradients_that_an_earlier_run_left_are_there_too(model: str):
    inputs = given(model)
    assert inputs.given.model is not None
    for parameter in inputs.given.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert forecast_inputs(inputs).loaded_gib == 18_752 * 8 / GIB


def test_a_given_model_counts_as_free_where_memory_is_scarce(model: str):
    inputs = given(model, sampling__max_rows=4)
    needs = forecast_inputs(inputs)
    require_memory(inputs, needs, free=int(wanted(needs)) + 1)
    with pytest.raises(ConfigError, match="would fit"):
        require_memory(inputs, needs, free=int(wanted(needs) * 0.95))


def test_the_token_budget_bounds_the_update(model: str):
    def update(budget: int) -> float:
        config = tiny_recipe(model, training__max_tokens_per_micro_batch=budget)
        return forecast(config).update_gib

    assert update(20) < update(41) < update(82) == update(2048)


def test_only_prompts_that_rounds_will_take_count(model: str, tmp_path: Path):
    rows = [f'{{"problem": "{"x" * n}", "answer": "1"}}' for n in range(1, 31)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    task = {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl"), "held_out_items": 5}
    longest = 33  # 30 letters and three chat tokens

    def first_round(seed: int) -> int:
        inputs = read_inputs(tiny_recipe(model, task=task, training__seed=seed))
        return max(len(prompt.token_ids or ()) for prompt in inputs.prompts.take(0, 8))

    seed = next(seed for seed in range(20) if first_round(seed) < longest)
    one = tiny_recipe(model, task=task, training__rounds=1, training__seed=seed)
    assert forecast(one).longest_prompt_tokens == first_round(seed)
    whole_epoch = tiny_recipe(model, task=task, training__rounds=4, training__seed=seed)
    assert forecast(whole_epoch).longest_prompt_tokens == longest


def test_worked_examples_make_the_cache_longer(model: str):
    room = {"sampling__max_length": 128}
    plain = forecast(tiny_recipe(model, **room)).cache_gib
    shown = forecast(tiny_recipe(model, evaluation={"few_shot": 3}, **room)).cache_gib
    # 4 questions of 17 tokens with answers: over 64, at most 96 in place of 32, for 8 prompts
    assert shown - plain == pytest.approx(8 * 64 * 256 / GIB, rel=1e-12)


def test_the_plain_engine_holds_all_logits(model: str):
    fast = forecast(tiny_recipe(model)).update_gib
    plain = forecast(tiny_recipe(model, training__engine="plain")).update_gib
    assert plain > 2 * fast


def test_fewer_held_out_items_are_counted(model: str):
    assert forecast(tiny_recipe(model, evaluation__items=2)).held_out_items == 2


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "gpt2"])
def test_the_parameters_of_any_family_are_counted_without_its_weights(family: str, tmp_path: Path):
    name = save_tiny(tmp_path, family)
    (tmp_path / "model.safetensors").unlink()
    needs = forecast(tiny_recipe(name))
    assert needs.num_parameters == sum(p.numel() for p in tiny_model(family).parameters())
    assert needs.peak_gib > needs.process_gib


def test_a_run_that_cannot_start_has_no_forecast(model: str, tmp_path: Path):
    with pytest.raises(DataError, match=r"that sampling\.max_length leaves"):
        forecast(tiny_recipe(model, sampling__max_length=19))
    with pytest.raises(ModelError, match="cannot"):
        forecast(tiny_recipe(str(tmp_path / "none")))


# What cannot fit


def wanted(needs: Forecast) -> float:
    return needs.wanted_gib * GIB


def refusal(config: RunConfig, *, free: float) -> str:
    with pytest.raises(ConfigError) as caught:
        require_memory(read_inputs(config), forecast(config), free=int(free))
    return str(caught.value)


def large(model: str, **changes: Any) -> RunConfig:
    """Most of it is the micro-batch, then the sampler's cache."""
    changes = {"sampling__max_new_tokens": 40, "sampling__max_rows": 8} | changes
    return tiny_recipe(model, **changes)


def test_what_fits_is_not_refused(model: str):
    config = large(model)
    inputs, needs = read_inputs(config), forecast(config)
    require_memory(inputs, needs, free=int(wanted(needs)) + 1)
    require_memory(inputs, needs, free=None)


def test_of_several_processes_fewer_are_offered_first(model: str):
    alone, three = large(model), large(model, training__processes=3)
    needs = forecast(three)
    assert needs.helpers_gib > 0
    assert forecast(alone).helpers_gib == 0
    # What this process holds already is measured, and not to the last byte alike.
    assert needs.peak_gib == pytest.approx(forecast(alone).peak_gib, abs=0.01)
    # Two helpers take what the leader does but its rollouts and AdamW's moments.
    moments = 8 * needs.trained_parameters / GIB
    assert needs.helpers_gib == pytest.approx(2 * (needs.peak_gib - needs.rollouts_gib - moments))
    said = refusal(three, free=wanted(needs) * 0.8)
    assert "; the other processes " in said
    assert "training.processes = 2 would fit" in said
    assert wanted(forecast(large(model, training__processes=2))) <= wanted(needs) * 0.8


def test_what_does_not_fit_is_refused_with_its_parts_and_a_budget_that_fits(model: str):
    config = large(model)
    needs = forecast(config)
    free = wanted(needs) * 0.8
    said = refusal(config, free=free)
    assert said.startswith(
        f"the run needs about {wanted(needs) / GIB:.2f} GiB of memory and {free / GIB:.2f} GiB "
        "are free (weights, gradients and moments "
    )
    assert said.endswith(" would fit, or set training.refuse_beyond_memory = false to try anyway")
    (budget,) = re.findall(r"training\.max_tokens_per_micro_batch = (\d+) would fit", said)
    fits = forecast(large(model, training__max_tokens_per_micro_batch=int(budget)))
    assert wanted(fits) <= free
    more = forecast(large(model, training__max_tokens_per_micro_batch=int(budget) + 1))
    assert wanted(more) > free


def test_rows_are_lowered_where_the_cache_is_what_does_not_fit(model: str):
    config = tiny_recipe(model, sampling__max_rows=512)
    free = wanted(forecast(config)) * 0.5
    (rows,) = re.findall(r"sampling\.max_rows = (\d+) would fit", refusal(config, free=free))
    assert wanted(forecast(tiny_recipe(model, sampling__max_rows=int(rows)))) <= free
    assert wanted(forecast(tiny_recipe(model, sampling__max_rows=int(rows) + 1))) > free


def test_both_are_lowered_where_neither_alone_would_do(model: str):
    config = large(model, sampling__max_rows=64)
    least = forecast(large(model, sampling__max_rows=1, training__max_tokens_per_micro_batch=1))
    free = wanted(least) * 1.05
    said = refusal(config, free=free)
    ((tokens, rows),) = re.findall(
        r"max_tokens_per_micro_batch = (\d+) with sampling\.max_rows = (\d+) would fit", said
    )
    smaller = large(
        model,
        sampling__max_rows=int(rows),
        training__max_tokens_per_micro_batch=int(tokens),
    )
    assert wanted(forecast(smaller)) <= free


def test_rollouts_are_lowered_where_they_are_what_does_not_fit(model: str):
    def needs(group: int, prompts: int) -> float:
        config = tiny_recipe(model, sampling__group_size=group, sampling__prompts_per_round=prompts)
        return wanted(forecast(config))

    free = needs(8, 8) * 4
    config = tiny_recipe(model, sampling__group_size=1_000_000)
    said = refusal(config, free=free)
    (group,) = re.findall(r"; sampling\.group_size = (\d+) would fit, or set", said)
    assert needs(int(group), 8) <= free < needs(int(group) + 1, 8)
    config = tiny_recipe(model, sampling__prompts_per_round=1_000_000)
    said = refusal(config, free=free)
    (prompts,) = re.findall(r"; sampling\.prompts_per_round = (\d+) would fit, or set", said)
    assert int(prompts) % 4 == 0  # a step takes whole groups
    assert needs(8, int(prompts)) <= free < needs(8, int(prompts) + 4)


def test_rollouts_are_lowered_with_what_costs_time_where_they_do_not_suffice(model: str):
    config = large(model, sampling__group_size=1_000_000)
    least = large(
        model,
        sampling__group_size=2,
        sampling__prompts_per_round=4,
        sampling__max_rows=1,
        training__max_tokens_per_micro_batch=1,
    )
    free = wanted(forecast(least)) * 1.02
    said = refusal(config, free=free).partition("); ")[2]
    found = dict(re.findall(r"(\w+\.\w+) = (\d+)", said))
    changes = {key.replace(".", "__"): int(value) for key, value in found.items()}
    assert "sampling__group_size" in changes
    assert wanted(forecast(large(model, **{"sampling__group_size": 2} | changes))) <= free


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling__max_rows": 100_000},
        {"sampling__max_new_tokens": 200, "sampling__max_length": 256, "sampling__max_rows": 2},
        {"sampling__group_size": 1_000_000},
    ],
    ids=["sampling is larger", "a micro-batch is larger", "rollouts"],
)
def test_the_parts_that_a_refusal_names_add_up_to_what_is_needed(
    model: str, changes: dict[str, Any]
):
    # The tiny model's would all be 0.00: each figure a GiB for a byte.
    config = tiny_recipe(model, **changes)
    needs = forecast(config)
    scaled = replace(
        needs,
        **{name: value * GIB for name, value in needs.as_dict().items() if name.endswith("_gib")},
    )
    reason = refusal_beyond_memory(read_inputs(config), scaled, free=1000)
    found = re.match(
        r"the run needs about (\S+) GiB of memory and 0\.00 GiB are free \(weights, gradients "
        r"and moments (\S+), sampler's cache (\S+), a round's rollouts (\S+), and for a moment "
        r"(?:a micro-batch|sampling) (\S+), while (?:a micro-batch|sampling) takes (\S+)\); ",
        reason or "",
    )
    assert found, reason
    total, *parts, less = (float(number) for number in found.groups())
    assert sum(parts) == pytest.approx(total, abs=0.05)
    assert less <= parts[-1]


def test_a_model_too_large_for_anything_is_said_to_be(model: str):
    said = refusal(large(model), free=1000)
    assert said.endswith(
        "with one row at a time it would still need 0.00 GiB; lora.rank = 16 and "
        "training.gradient_checkpointing = true take less, else take a smaller model or a machine "
        "with more memory, or set training.refuse_beyond_memory = false to try anyway"
    )
    lighter = {"lora": {"rank": 2}, "training__gradient_checkpointing": True}
    said = refusal(large(model, **lighter), free=1000)
    assert "would still need 0.00 GiB; take a smaller model" in said


def test_the_recipe_may_ask_to_try_anyway(model: str):
    config = large(model, training__refuse_beyond_memory=False)
    require_memory(read_inputs(config), forecast(config), free=1000)


def test_free_memory_is_the_hosts_on_a_cpu():
    free = free_bytes(torch.device("cpu"))
    assert free is None or free > 0
