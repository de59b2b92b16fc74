"""Adapters on disk: PEFT reads ours, we read PEFT's, and what cannot be merged is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapters import adapted_policy, in_peft
from tests.models import FAMILIES, character_tokenizer, save_tiny, tiny_model
from transformers import AutoModelForCausalLM

from gmpo.errors import ModelError
from gmpo.policy.adapter_files import (
    is_adapter_folder,
    load_adapter_weights,
    read_adapter,
    save_adapter,
)
from gmpo.policy.load import load_model, load_policy, load_tokenizer, model_folder
from gmpo.policy.score import Policy

TOKEN_IDS = torch.tensor([[11, 12, 13, 14, 15]])

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft asks for it
)
every_family = pytest.mark.parametrize("family", FAMILIES)


def saved(folder: Path, family: str = "llama", **changes: Any) -> tuple[Policy, Path]:
    """A policy whose base lies in a folder, and the folder of its adapter."""
    policy = adapted_policy(family, dtype=torch.float32, **changes)
    policy.model.name_or_path = save_tiny(folder / "base", family)
    adapter = folder / "adapter"
    adapter.mkdir()
    save_adapter(policy, adapter)
    return policy, adapter


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKEN_IDS).logits


def edit_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@every_family
@pytest.mark.parametrize("targets", [None, ["0.attn.c_attn", "0.self_attn.q_proj"]])
def test_peft_loads_our_adapter_and_gives_our_logits(
    family: str, targets: list[str] | None, tmp_path: Path
):
    if targets:
        targets = targets[:1] if family == "gpt2" else targets[1:]
    policy, adapter = saved(tmp_path, family, targets=targets, alpha=5.0)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, adapter).eval()
    torch.testing.assert_close(logits(theirs), logits(policy.model), rtol=0, atol=1e-5)
    assert theirs.peft_config["default"].r == 3
    # Exactly our layers, no more: a layer that PEFT adds would keep its B at zero unseen.
    layers = {n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert {name.removeprefix("base_model.model.") for name in layers} == set(policy.adapters)


def test_targets_are_named_by_their_last_parts_where_these_name_nothing_else(tmp_path: Path):
    for targets, expected in (
        (["q_proj", "up_proj"], ["q_proj", "up_proj"]),
        (["0.self_attn.q_proj"], ["model.layers.0.self_attn.q_proj"]),
    ):
        folder = tmp_path / expected[0]
        folder.mkdir()
        _, adapter = saved(folder, targets=targets)
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert config["target_modules"] == expected


@every_family
def test_an_adapters_folder_names_the_merged_model(family: str, tmp_path: Path):
    policy, adapter = saved(tmp_path, family, alpha=5.0)
    assert is_adapter_folder(adapter) and not is_adapter_folder(tmp_path / "base")
    merged = load_model(str(adapter), device="cpu", dtype="fp32")
    torch.testing.assert_close(logits(merged), logits(policy.model), rtol=0, atol=1e-5)
    expected = dict(policy.named_weights())
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name], msg=name)
    assert model_folder(str(adapter)) == str(tmp_path / "base")


def test_in_bf16_the_merged_weight_is_rounded_once(tmp_path: Path):
    policy, adapter = saved(tmp_path)
    merged = load_policy(str(adapter), device="cpu", dtype="bf16", warn=lambda _: None)
    name = "model.layers.0.self_attn.q_proj"
    layer = policy.adapters[name]
    # The base is held in bf16, as in a run of that precision.
    base = tiny_model().get_submodule(name).weight.detach().bfloat16().float()
    expected = (base + layer.scale * (layer.lora_B @ layer.lora_A)).bfloat16()
    assert torch.equal(merged.model.get_parameter(f"{name}.weight"), expected)


def test_in_bf16_masters_have_the_merged_weights_digits(tmp_path: Path):
    policy, adapter = saved(tmp_path)
    said: list[str] = []
    merged = load_policy(str(adapter), device="cpu", dtype="bf16", warn=said.append)
    masters = dict(merged.named_weights())
    base = dict(tiny_model().named_parameters())
    for name, layer in policy.adapters.items():
        rounded = base[f"{name}.weight"].detach().bfloat16().float()
        expected = rounded + layer.scale * (layer.lora_B @ layer.lora_A)
        assert torch.equal(masters[f"{name}.weight"], expected)
        assert not torch.equal(expected, expected.bfloat16().float())
    assert said == []


@every_family
def test_an_adapter_that_peft_wrote_is_read(family: str, tmp_path: Path):
    policy, _ = saved(tmp_path, family)
    theirs = in_peft(policy, family)
    theirs.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    theirs.save_pretrained(tmp_path / "peft")
    merged = load_model(str(tmp_path / "peft"), device="cpu", dtype="fp32")
    torch.testing.assert_close(logits(merged), logits(policy.model), rtol=0, atol=1e-5)


def test_saved_factors_come_back_bit_for_bit(tmp_path: Path):
    policy, adapter = saved(tmp_path)
    other = adapted_policy(dtype=torch.float32, is_moved=False)
    load_adapter_weights(other, adapter)
    for name, weight in other.trained_weights().items():
        assert torch.equal(weight, policy.trained_weights()[name]), name


def test_factors_of_other_layers_or_ranks_are_refused(tmp_path: Path):
    _, adapter = saved(tmp_path)
    fewer = adapted_policy(dtype=torch.float32, targets=["q_proj"])
    with pytest.raises(ModelError, match=r"24 names differ"):
        load_adapter_weights(fewer, adapter)
    wider = adapted_policy(dtype=torch.float32, rank=4)
    with pytest.raises(ModelError, match=r"lora_A has shape \(3, 32\), this model needs \(4, 32\)"):
        load_adapter_weights(wider, adapter)


def test_the_tokenizer_is_the_adapters_own_or_its_bases(tmp_path: Path):
    _, adapter = saved(tmp_path)
    assert load_tokenizer(str(adapter)).chat_template == character_tokenizer().chat_template
    character_tokenizer(chat=False).save_pretrained(adapter)
    assert load_tokenizer(str(adapter)).chat_template is None
    assert load_tokenizer(str(adapter))("12+3")["input_ids"] == [6, 7, 77, 8]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', and only 'LORA' can be merged here"),
        ({"bias": "all"}, "bias is 'all', and only 'none' can be merged here"),
        ({"use_dora": True}, "it uses ['use_dora'], which cannot be merged here"),
        ({"use_rslora": True}, "it uses ['use_rslora'], which cannot be merged here"),
        (
            {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2}},
            "it uses ['alpha_pattern', 'rank_pattern'], which cannot be merged here",
        ),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the base model's"),
        ({"r": None}, "r is None"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is None"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(changes: dict[str, Any], said: str, tmp_path: Path):
    _, adapter = saved(tmp_path)
    edit_config(adapter, **changes)
    with pytest.raises(ModelError) as caught:
        read_adapter(adapter)
    message = str(caught.value)
    assert message.startswith(f"adapter {adapter}: {said}")
    assert message.endswith(
        "; merge it with peft's merge_and_unload and name the folder of the merged model"
    )


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_adapter_is_named(name: str, tmp_path: Path):
    _, adapter = saved(tmp_path)
    (adapter / name).write_bytes(b"{")
    with pytest.raises(ModelError) as caught:
        read_adapter(adapter)
    assert str(caught.value).startswith(f"adapter {adapter} cannot be read: ")
    assert str(caught.value).endswith("it needs adapter_config.json and adapter_model.safetensors")


def test_an_adapter_of_another_base_is_refused(tmp_path: Path):
    _, adapter = saved(tmp_path)
    other = save_tiny(tmp_path / "other", "gpt2")
    edit_config(adapter, base_model_name_or_path=other)
    with pytest.raises(ModelError) as caught:
        load_model(str(adapter), device="cpu", dtype="fp32")
    assert str(caught.value) == (
        "the adapter's part 'model.layers.0.mlp.down_proj' fits no linear layer of its base model "
        f"{other!r}; set base_model_name_or_path in its adapter_config.json to the model it was "
        "trained on"
    )


@pytest.mark.parametrize("kind", ["half a pair", "another shape", "a tied head"])
def test_factors_that_do_not_fit_are_refused(kind: str, tmp_path: Path):
    _, adapter = saved(tmp_path, targets=["q_proj"])
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    if kind == "half a pair":
        del tensors[f"{name}A.weight"]
    elif kind == "another shape":
        tensors[f"{name}B.weight"] = torch.zeros(48, 3)
    else:
        tensors = {
            "base_model.model.lm_head.lora_A.weight": torch.zeros(3, 32),
            "base_model.model.lm_head.lora_B.weight": torch.zeros(101, 3),
        }
    save_file(tensors, path)
    with pytest.raises(ModelError, match="fits no linear layer of its base model"):
        load_model(str(adapter), device="cpu", dtype="fp32")
