"""What a run will need, by hand for the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.models import save_tiny, tiny_model
from tests.tiny_runs import tiny_recipe

from gmpo.errors import DataError, ModelError
from gmpo.forecast import forecast

GIB = 2**30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


def test_the_estimate_is_the_one_by_hand(model: str):
    needs = forecast(tiny_recipe(model))
    # Embedding, tied to the head: 101 x 32 = 3,232. A layer: queries and output 2 x 32 x 32, keys
    # and values 2 x 32 x 16, feed-forward 3 x 32 x 48, norms 2 x 32: 7,744. Last norm: 32.
    assert needs.num_parameters == 3_232 + 2 * 7_744 + 32 == 18_752
    assert needs.held_out_items == 5
    assert needs.longest_prompt_tokens == 17  # "What is 4 + 4?" and three chat tokens
    assert needs.completion_tokens_per_round == 8 * 8 * 3
    assert needs.prompt_tokens_per_round == 8 * 17
    assert needs.optimizer_steps == 2 * 4
    # fp32 weight, gradient, two moments: 16 bytes
    assert needs.weights_gib == 18_752 * 16 / GIB
    # 64 rows of 17 + 3 tokens; keys and values of 2 heads x 8 in 2 layers; three tables of logits
    assert needs.sampler_gib == (64 * 20 * 2 * 16 * 2 * 4 + 3 * 64 * 101 * 4) / GIB
    # A step's 2 groups of 17 + 8 x 3 tokens; 10 x 32 + 5 x 48 numbers a layer; 256 rows of logits
    assert needs.activations_gib == (82 * 560 * 2 * 4 + 3 * 256 * 101 * 4) / GIB
    parts = needs.weights_gib + needs.sampler_gib + needs.activations_gib
    assert needs.total_gib == pytest.approx(parts + 0.6)


def test_what_adds_copies_of_the_weights_adds_memory(model: str):
    plain = forecast(tiny_recipe(model)).weights_gib
    with_reference = forecast(tiny_recipe(model, objective={"kl_coefficient": 0.1})).weights_gib
    with_cosine = forecast(tiny_recipe(model, training__gradient_cosine_every=5)).weights_gib
    assert with_reference == with_cosine == plain * 20 / 16
    narrow = forecast(tiny_recipe(model, model__dtype="bf16")).weights_gib
    assert narrow == plain * 20 / 16  # the compute copy and its gradients


def test_the_token_budget_bounds_the_activations(model: str):
    small = forecast(tiny_recipe(model, training__max_tokens_per_micro_batch=41)).activations_gib
    large = forecast(tiny_recipe(model)).activations_gib
    assert large - small == pytest.approx(41 * 560 * 2 * 4 / GIB)


def test_fewer_held_out_items_are_counted(model: str):
    assert forecast(tiny_recipe(model, evaluation__items=2)).held_out_items == 2


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "gpt2"])
def test_the_parameters_of_any_family_are_counted_without_its_weights(family: str, tmp_path: Path):
    name = save_tiny(tmp_path, family)
    (tmp_path / "model.safetensors").unlink()
    needs = forecast(tiny_recipe(name))
    assert needs.num_parameters == sum(p.numel() for p in tiny_model(family).parameters())
    assert needs.total_gib > 0.6


def test_a_run_that_cannot_start_has_no_estimate(model: str, tmp_path: Path):
    with pytest.raises(DataError, match=r"that sampling\.max_length leaves"):
        forecast(tiny_recipe(model, sampling__max_length=19))
    with pytest.raises(ModelError, match="cannot"):
        forecast(tiny_recipe(str(tmp_path / "none")))
