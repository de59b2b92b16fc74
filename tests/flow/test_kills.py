"""A run that is killed at any moment ends, resumed, like one that was not: bit for bit."""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.killed_runs import Death, digest, run_in_process
from tests.models import save_tiny
from tests.tiny_runs import metric_lines, tiny_recipe

from gmpo.checkpoint import latest_checkpoint
from gmpo.config import RunConfig
from gmpo.tracking import read_lines


@dataclass(frozen=True, kw_only=True)
class Whole:
    """The run that nobody killed."""

    config: RunConfig
    folder: Path
    touches: int
    seconds: float


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return undisturbed(tmp_path_factory)


def undisturbed(tmp_path_factory: pytest.TempPathFactory, **changes: Any) -> Whole:
    config = tiny_recipe(
        save_tiny(tmp_path_factory.mktemp("model")),
        **{
            "training": {
                "rounds": 5,
                "steps_per_round": 4,
                "learning_rate": 1e-3,
                "schedule": "cosine",
            },
            "sampling__max_new_tokens": 12,
            "checkpoint": {"every_rounds": 2, "keep": 1},
            "evaluation": {"every_rounds": 2, "few_shot": 1, "sampled": True, "items_during": 3},
            **changes,
        },
    )
    folder = tmp_path_factory.mktemp("runs") / "whole"
    ended = run_in_process(config, folder)
    assert ended.exit_code == 0
    return Whole(config=config, folder=folder, touches=ended.touches, seconds=ended.seconds)


def log(folder: Path) -> list[dict[str, Any]]:
    """Every line the run wrote, without what the clock and the machine decide."""
    lines = [*metric_lines(folder), *read_lines(folder, "rollouts.jsonl")]
    lines += read_lines(folder, "evaluations.jsonl")
    return [
        {name: v for name, v in line.items() if not name.startswith(("time/", "memory/"))}
        for line in lines
    ]


def assert_ends_like(whole: Whole, folder: Path, deaths: list[Death]) -> None:
    codes = []
    for death in [*deaths, Death()]:
        codes.append(run_in_process(whole.config, folder, death).exit_code)
        if codes[-1] == 0:
            break
    assert set(codes[:-1]) == {-signal.SIGKILL}
    assert codes[-1] == 0
    ends = [latest_checkpoint(each / "checkpoints") for each in (whole.folder, folder)]
    assert None not in ends
    assert digest(ends[0]) == digest(ends[1])
    assert log(folder) == log(whole.folder)
    assert not list((folder / "rounds").iterdir())


def at_random_moments(whole: Whole, folder: Path, seed: int) -> None:
    """Killed at a touch of a file, resumed, killed in the midst of computing, resumed."""
    chance = random.Random(seed)
    by_touch = Death(touches=chance.randint(1, whole.touches))
    by_clock = Death(seconds=chance.uniform(0.1, 0.7) * whole.seconds)
    deaths = [by_touch, by_clock] if seed % 2 else [by_clock, by_touch]
    assert_ends_like(whole, folder, deaths)


@pytest.mark.parametrize("seed", range(5))
def test_killed_at_random_moments(seed: int, whole: Whole, tmp_path: Path):
    at_random_moments(whole, tmp_path / "run", seed)


def test_adapters_and_recomputed_layers_survive_kills_too(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
):
    training = {"rounds": 3, "learning_rate": 1e-2, "gradient_checkpointing": True}
    adapted = undisturbed(tmp_path_factory, training=training, lora={"rank": 2})
    checkpoint = latest_checkpoint(adapted.folder / "checkpoints")
    assert (checkpoint / "adapter" / "adapter_model.safetensors").is_file()
    folder = tmp_path / "run"
    assert_ends_like(
        adapted,
        folder,
        [Death(touches=adapted.touches * 2 // 3), Death(touches=adapted.touches // 5)],
    )
    factors = load_file(checkpoint / "adapter" / "adapter_model.safetensors")
    # B starts at 0: training has moved what is compared.
    assert all(factor.any() for name, factor in factors.items() if "lora_B" in name)


@pytest.mark.verify
@pytest.mark.parametrize("seed", range(5, 25))
def test_killed_at_twenty_more_random_moments(seed: int, whole: Whole, tmp_path: Path):
    at_random_moments(whole, tmp_path / "run", seed)
