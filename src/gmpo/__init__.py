"""Geometric-Mean Policy Optimization of language models from verifiable rewards.

Importing this package does nothing and does not import torch; names load when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gmpo.geometric import SafeGeometricMean, compare_sensitivity
    from gmpo.records import Group, Message, Prompt, Rollout
    from gmpo.trainer import GMPOTrainer
    from gmpo.trainer_config import GMPOConfig

__version__ = "0.1.0"

__all__ = [
    "GMPOConfig",
    "GMPOTrainer",
    "Group",
    "Message",
    "Prompt",
    "Rollout",
    "SafeGeometricMean",
    "__version__",
    "compare_sensitivity",
]

_HOMES = {
    "GMPOConfig": "gmpo.trainer_config",
    "GMPOTrainer": "gmpo.trainer",
    "Group": "gmpo.records",
    "Message": "gmpo.records",
    "Prompt": "gmpo.records",
    "Rollout": "gmpo.records",
    "SafeGeometricMean": "gmpo.geometric",
    "compare_sensitivity": "gmpo.geometric",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gmpo' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
