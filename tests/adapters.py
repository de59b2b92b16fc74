"""Tiny policies with adapters, and the same adapters in PEFT."""

from __future__ import annotations

import peft
import torch
from tests.models import tiny_model
from torch import Tensor

from gmpo.batch import MicroBatch
from gmpo.policy.lora import adapters_of, add_adapters
from gmpo.policy.score import Policy


def adapted_policy(
    family: str = "llama",
    *,
    engine: str = "fast",
    dtype: torch.dtype = torch.float64,
    rank: int = 3,
    alpha: float = 6.0,
    targets: list[str] | None = None,
    is_moved: bool = True,
    gradient_checkpointing: bool = False,
) -> Policy:
    """A tiny policy that trains adapters alone; `is_moved`: B is not zero any more."""
    model = tiny_model(family, dtype=dtype)
    add_adapters(model, rank=rank, alpha=alpha, targets=targets, seed=1)
    if is_moved:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for layer in adapters_of(model).values():
                layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))
    return Policy(
        model,
        engine=engine,
        gradient_checkpointing=gradient_checkpointing,
        warn=lambda _: None,  # gpt2 takes the plain path, which is tested where it belongs
    )


def in_peft(policy: Policy, family: str) -> peft.PeftModel:
    """A PEFT model with the policy's adapters on a base of its own."""
    layer = next(iter(policy.adapters.values()))
    config = peft.LoraConfig(
        r=layer.rank,
        lora_alpha=layer.alpha,
        target_modules=sorted(policy.adapters),
        fan_in_fan_out=layer.is_transposed,
        task_type="CAUSAL_LM",
    )
    # Adapters stay in the model's precision, also where it is wider than fp32.
    wrapped = peft.get_peft_model(
        tiny_model(family, dtype=policy.dtype), config, autocast_adapter_dtype=False
    )
    state = {
        f"base_model.model.{name}.weight": tensor
        for name, tensor in policy.trained_weights().items()
    }
    loaded = peft.set_peft_model_state_dict(wrapped, state)
    assert not loaded.unexpected_keys
    return wrapped.eval()


def peft_factors(model: peft.PeftModel) -> dict[str, torch.nn.Parameter]:
    """Its trained parameters by the names they have in a policy."""
    return {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def obvious_logprobs(model: torch.nn.Module, batch: MicroBatch) -> Tensor:
    """Each row alone through a model's own forward, no padding and no cache: [B, T]."""
    rows = []
    for row, prompt in enumerate(batch.prompt_of_row.tolist()):
        start = int(batch.prompt_lengths[prompt])
        drawn = batch.completion_ids[row, : int(batch.completion_lengths[row])]
        token_ids = torch.cat((batch.prompt_ids[prompt, :start], drawn))
        logprobs = model(token_ids[None]).logits[0].log_softmax(dim=-1)
        chosen = logprobs[start - 1 : -1].gather(-1, drawn[:, None])[:, 0]
        padding = batch.mask.shape[1] - len(drawn)
        rows.append(torch.nn.functional.pad(chosen, (0, padding)))
    return torch.stack(rows)
