"""What the sides hand to each other in files: starting weights, completions, updates."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gmpo.policy.load import load_model


@dataclass(frozen=True, kw_only=True)
class Scratch:
    """Files of one benchmark in a folder that is removed afterwards."""

    folder: Path

    @property
    def start(self) -> Path:
        """fp32 weights that every round starts from."""
        return self.folder / "start.safetensors"

    @property
    def completions(self) -> Path:
        """The last round of TRL."""
        return self.folder / "completions.json"

    @property
    def update(self) -> Path:
        """How TRL's last round moved the weights."""
        return self.folder / "update.safetensors"

    @property
    def gradient(self) -> Path:
        """A sample of TRL's first gradient in that round, as `gradient_sample` takes it."""
        return self.folder / "gradient.safetensors"

    @property
    def learned(self) -> Path:
        """fp32 weights of a run that learns, as it was last asked for them."""
        return self.folder / "learned.safetensors"


@dataclass(frozen=True, kw_only=True)
class SampledRows:
    """A round's rows in the order of its prompts, group by group."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    rewards: list[float]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> SampledRows:
        return cls(**json.loads(path.read_text()))

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) for ids in self.completion_ids)

    def live_share(self, group_size: int) -> float:
        """Share of the groups whose rewards differ."""
        groups = [
            self.rewards[first : first + group_size]
            for first in range(0, len(self.rewards), group_size)
        ]
        return sum(len(set(group)) > 1 for group in groups) / len(groups)


def write_start(model: str, path: Path) -> None:
    """The model's weights in fp32, for both sides to start from."""
    weights = load_model(model, device="cpu", dtype="fp32").named_parameters()
    save_weights({name: weight.detach() for name, weight in weights}, path)


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path)


def load_weights(path: Path) -> dict[str, Tensor]:
    return load_file(path)


GRADIENT_STRIDE = 16
"""So few entries of a gradient cost the side that keeps them hardly any time and memory."""


def gradient_sample(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Every 16th entry of each weight's gradient, in fp32; empty where all of them are zero.

    The entries are copies: views would keep whole gradients, and count as the side's memory.
    """
    sample = {
        name: weight.grad.flatten()[::GRADIENT_STRIDE].to("cpu", torch.float32, copy=True)
        for name, weight in weights
        if weight.grad is not None
    }
    return sample if any(bool(entries.any()) for entries in sample.values()) else {}


def clear_moments(optimizer: torch.optim.Optimizer) -> None:
    """A fresh optimizer in the memory of the old one.

    A run allocates the moments once; a new optimizer a round would pay for that every time.
    """
    for state in optimizer.state.values():
        for value in state.values():
            assert isinstance(value, Tensor), "AdamW's state is tensors"
            value.zero_()
