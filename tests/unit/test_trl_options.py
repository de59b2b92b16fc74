"""The adapter for TRL refuses what its loss would ignore, and other releases of TRL."""

from __future__ import annotations

import ast
import inspect
import textwrap
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
from tests.models import tiny_model
from tests.rollout_groups import VOCABULARY
from tests.trl_trainers import tolerated, trainer_of
from transformers import AutoModelForCausalLM, MixtralConfig
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOConfig

from gmpo.adapters.trl import _MODEL_INPUTS, IGNORED_OPTIONS, TRLGMPOTrainer, require_trl
from gmpo.errors import ConfigError, DependencyError

pytestmark = tolerated


def config_of(**options: Any) -> GMPOConfig:
    return GMPOConfig(
        output_dir="unused",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        num_generations=2,
        **options,
    )


OTHER_VALUES = {
    "loss_type": "dr_grpo",
    "importance_sampling_level": "sequence",
    "delta": 2.0,
    "top_entropy_quantile": 0.5,
    "off_policy_mask_threshold": 0.5,
    "entropy_coef": 0.01,
    "use_adaptive_entropy": True,
    "entropy_coef_min": 0.1,
    "entropy_coef_max": 0.5,
    "entropy_coef_delta": 0.1,
    "entropy_target": 0.5,
    "sapo_temperature_neg": 2.0,
    "sapo_temperature_pos": 2.0,
    "vespo_k_pos": 1.0,
    "vespo_k_neg": 1.0,
    "vespo_lambda_pos": 1.0,
    "vespo_lambda_neg": 1.0,
}


@pytest.mark.parametrize("name", list(IGNORED_OPTIONS))
def test_an_option_that_the_loss_would_ignore_is_refused_by_name(name: str):
    value = OTHER_VALUES[name]
    with pytest.raises(ConfigError, match=f"{name}={value!r} would have no effect: .*leave it at "):
        TRLGMPOTrainer(tiny_model(), print, config_of(**{name: value}))


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask"])
def test_weights_of_single_tokens_are_refused_where_vllm_would_apply_them(mode: str):
    options = {"vllm_importance_sampling_mode": mode}
    with pytest.raises(ConfigError, match=f"'{mode}' weighs single tokens, but GMPO has one"):
        TRLGMPOTrainer(tiny_model(), print, config_of(use_vllm=True, **options))
    trainer_of(TRLGMPOTrainer, **options)


def test_grpos_config_is_refused_because_its_epsilon_is_another():
    args = GRPOConfig(
        output_dir="unused",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        num_generations=2,
    )
    with pytest.raises(ConfigError, match="args is a GRPOConfig, whose epsilon is a half-width"):
        TRLGMPOTrainer(tiny_model(), print, args)


def test_the_auxiliary_loss_of_a_mixture_of_experts_is_refused_and_can_be_switched_off():
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef is 0\.001 .*set router_aux_loss"):
        trainer_of(TRLGMPOTrainer, model=mixture_of_experts())
    trainer_of(TRLGMPOTrainer, model=mixture_of_experts(), router_aux_loss_coef=0.0)


def mixture_of_experts() -> Any:
    return AutoModelForCausalLM.from_config(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


# What GRPO's loss reads and this one honours, or has no need of.
HONOURED = {
    "epsilon_low",
    "epsilon_high",
    "beta",
    "use_bias_correction_kl",
    "aux_loss_enabled",  # refused after the model is known
    "router_aux_loss_coef",
    "use_vllm",
    "vllm_importance_sampling_correction",
}
READ_OF_OTHER_LOSSES = {
    "max_completion_length",  # Dr. GRPO's normaliser
    "steps_per_generation",  # DAPO's
}
INSIDE_TRL = {
    "accelerator",
    "args",
    "model",
    "current_gradient_accumulation_steps",
    "get_gamma_weights",
    "get_high_entropy_mask",
    "get_off_policy_mask",
}


def test_every_option_that_grpos_loss_reads_is_honoured_or_refused():
    tree = ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._compute_loss)))
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) in ("self", "self.args")
        and not node.attr.startswith("_")
    }
    assert "loss_type" in read and "delta" in read
    left = read - set(IGNORED_OPTIONS) - HONOURED - READ_OF_OTHER_LOSSES - INSIDE_TRL
    assert not left


def test_every_input_of_trls_forward_is_handed_on():
    parameters = set(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    assert set(_MODEL_INPUTS) <= parameters
    own = {"self", "model", "input_ids", "attention_mask", "logits_to_keep"}
    assert parameters - set(_MODEL_INPUTS) - own == {
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
    }


def test_another_release_of_trl_is_refused():
    require_trl("1.16")
    with pytest.raises(DependencyError, match=r"of trl 1\.1, but trl 1\.16\.0 is installed; pip"):
        require_trl("1.1")


def test_a_missing_trl_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("gmpo.adapters.trl.version", missing)
    with pytest.raises(DependencyError, match=r"needs trl 1\.16; pip install 'gmpo\[trl\]'"):
        require_trl("1.16")
