"""Registries of tiny models for tests."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from gmpo.gate import decide_gate
from gmpo.gate.policy import GatePolicy
from gmpo.gate.records import GateDecision, PairedSuite
from gmpo.registry import Registry
from gmpo.store import Champion, ModelVersion

NAME = "bot"


def model_folder(folder: Path, value: float, *, tokenizer: str = "{}") -> Path:
    """A folder of the form of a model's, whose only weights have this value."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"w": np.full((2, 3), value, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny"}))
    (folder / "tokenizer.json").write_text(tokenizer)
    return folder


def added(registry: Registry, folder: Path, value: float, **more: object) -> ModelVersion:
    """A version of the model `NAME`, told from others by its weights' value."""
    return registry.add(model_folder(folder / f"run-{value}", value), name=NAME, **more)


def decision(
    champion: str, candidate: str, *, gain: float = 0.0, revision: int = 1
) -> GateDecision:
    """The gate's decision where the candidate is better by so much on 1,000 items.

    The revision is that of the champion: 1 for the first one.
    """
    right = np.arange(1000) < 500
    moved = np.arange(1000) < 500 + 1000 * gain
    suite = PairedSuite(suite="sums", champion=right.astype(float), candidate=moved.astype(float))
    decided = decide_gate([suite], policy=GatePolicy(), champion=champion, candidate=candidate)
    return decided.bound_to(revision)


def promoted(registry: Registry, old: str, new: str) -> Champion:
    evidence = decision(old, new, revision=registry.history(NAME)[-1].revision)
    return registry.promote(NAME, expected_champion=old, candidate=new, evidence=evidence)


def serving(registry: Registry, tmp_path: Path, *values: float) -> list[str]:
    """Versions that became champion one after the other."""
    versions = [added(registry, tmp_path, value).version for value in values]
    registry.adopt(NAME, versions[0], reason="the first one")
    for old, new in pairwise(versions):
        promoted(registry, old, new)
    return versions


def damage(version: ModelVersion) -> None:
    file = Path(version.path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
