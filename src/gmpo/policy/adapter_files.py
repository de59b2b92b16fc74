"""Adapters on disk in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gmpo.errors import ModelError
from gmpo.policy.head import widened
from gmpo.policy.lora import LoraLayer, merged_weight
from gmpo.policy.score import Policy

__all__ = [
    "ADAPTER_WEIGHTS",
    "SavedAdapter",
    "is_adapter_folder",
    "load_adapter_weights",
    "merge_adapter",
    "read_adapter",
    "save_adapter",
    "write_adapter",
]

ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""File of the factors in an adapter's folder."""

_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
"""Keys of PEFT's configuration that leave W + (alpha / r) B A true, whatever they say."""


@dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """An adapter's folder as it was read.

    Attributes:
        config: PEFT's configuration.
        tensors: factors by PEFT's names.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def base(self) -> str:
        """Name or folder of the model the adapter belongs to."""
        return str(self.config["base_model_name_or_path"])

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return float(self.config["lora_alpha"]) / int(self.config["r"])


def is_adapter_folder(name: str | Path) -> bool:
    """Whether this is a folder with an adapter, not a whole model."""
    return (Path(name) / _CONFIG).is_file() and not (Path(name) / "config.json").is_file()


def save_adapter(policy: Policy, folder: Path) -> None:
    """Write the policy's adapters, in the precision they are trained in."""
    tensors = {
        _peft_name(name): tensor.contiguous().cpu()
        for name, tensor in policy.trained_weights().items()
    }
    write_adapter(folder, _config_of(policy), tensors)


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write PEFT's two files."""
    text = json.dumps(dict(config), indent=2, sort_keys=True)
    (folder / _CONFIG).write_text(text + "\n", encoding="utf-8")
    save_file(dict(tensors), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def load_adapter_weights(policy: Policy, folder: Path) -> None:
    """Put saved adapters back into a policy whose adapters are on the same layers.

    Raises:
        ModelError: they are on other layers or of another rank.
    """
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    policy.load_weights((_own_name(name), tensor) for name, tensor in tensors.items())


def read_adapter(folder: str | Path) -> SavedAdapter:
    """An adapter that W + (alpha / r) B A describes, from here or from PEFT.

    Raises:
        ModelError: a file is missing or damaged, or the adapter is of another kind.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"adapter {folder} cannot be read: {error}; it needs {_CONFIG} and {ADAPTER_WEIGHTS}"
        ) from None
    problem = _problem_with(config)
    if problem:
        raise ModelError(
            f"adapter {folder}: {problem}; merge it with peft's merge_and_unload and name the "
            "folder of the merged model"
        )
    return SavedAdapter(config=config, tensors=tensors)


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, adapter: SavedAdapter) -> None:
    """Add the adapter to the weights of a plain model, in place.

    Raises:
        ModelError: the model lacks a layer of the adapter, or has it in another shape.
    """
    modules = dict(model.named_modules())
    embeddings = model.get_input_embeddings().weight
    for name, factors in _factors_by_layer(adapter).items():
        module = modules.get(name)
        if (
            not isinstance(module, nn.Linear | Conv1D)
            or module.weight is embeddings  # a tied head: the embeddings would move with it
            or set(factors) != {"lora_A", "lora_B"}
            or _shape_of(factors) != _outputs_and_inputs(module)
        ):
            raise ModelError(
                f"the adapter's part {name!r} fits no linear layer of its base model "
                f"{adapter.base!r}; set base_model_name_or_path in its {_CONFIG} to the model it "
                "was trained on"
            )
        merged = merged_weight(
            module.weight,
            widened(factors["lora_A"]).to(module.weight.device),
            widened(factors["lora_B"]).to(module.weight.device),
            scale=adapter.scale,
            is_transposed=isinstance(module, Conv1D),
        )
        module.weight.copy_(merged)


def _config_of(policy: Policy) -> dict[str, Any]:
    """PEFT's configuration of the policy's adapters, which are all alike."""
    adapter = next(iter(policy.adapters.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": policy.model.name_or_path,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": adapter.is_transposed,
        "target_modules": _peft_targets(policy.model, policy.adapters),
    }


def _peft_targets(model: PreTrainedModel, adapters: Mapping[str, LoraLayer]) -> list[str]:
    """Last parts of the adapted layers' names where these name no other module, else whole names.

    PEFT adapts every module whose name ends in a target.
    """
    endings = {name.rpartition(".")[2] for name in adapters}
    named = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in endings}
    return sorted(endings if named == set(adapters) else adapters)


def _factors_by_layer(adapter: SavedAdapter) -> dict[str, dict[str, Tensor]]:
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.tensors.items():
        layer, _, kind = _own_name(name).rpartition(".")
        factors.setdefault(layer, {})[kind] = tensor
    return factors


def _shape_of(factors: Mapping[str, Tensor]) -> tuple[int, int]:
    return factors["lora_B"].shape[0], factors["lora_A"].shape[1]


def _outputs_and_inputs(layer: nn.Linear | Conv1D) -> tuple[int, int]:
    first, second = layer.weight.shape
    return (second, first) if isinstance(layer, Conv1D) else (first, second)


def _problem_with(config: Any) -> str | None:
    """Why B A alone would not be what this adapter does."""
    if not isinstance(config, dict):
        return f"{_CONFIG} holds no object"
    if config.get("peft_type") != "LORA":
        return f"peft_type is {config.get('peft_type')!r}, and only 'LORA' can be merged here"
    for key, kind in (("base_model_name_or_path", str), ("r", int), ("lora_alpha", int | float)):
        if not isinstance(config.get(key), kind):
            return f"{key} is {config.get(key)!r}"
    if config.get("bias", "none") != "none":
        return f"bias is {config['bias']!r}, and only 'none' can be merged here"
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        return f"init_lora_weights {config['init_lora_weights']!r} changes the base model's weights"
    active = sorted(key for key, value in config.items() if value and key not in _WITHOUT_EFFECT)
    return f"it uses {active}, which cannot be merged here" if active else None


def _peft_name(own: str) -> str:
    return f"{_PREFIX}{own}.weight"


def _own_name(name: str) -> str:
    return name.removeprefix(_PREFIX).removesuffix(".weight")
