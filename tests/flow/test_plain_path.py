"""Runs of a model that the fast path does not cover: what they say, and what they train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import save_tiny
from tests.tiny_runs import kept_in, metric_lines, tiny_recipe, weights

from gmpo.tracking import read_lines
from gmpo.training import TrainingResult, train


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.mark.parametrize(
    "compares",
    [{"objective": {"kl_coefficient": 0.01}}, {"training__kl_ref_every": 1}],
    ids=["KL term", "KL measured"],
)
def test_a_model_on_the_plain_path_says_so_once_though_a_reference_is_kept(
    gpt2: str, tmp_path: Path, compares: dict[str, Any]
):
    said: list[str] = []
    result = train(tiny_recipe(gpt2, **compares), folder=tmp_path / "run", warn=kept_in(said))
    assert [line for line in metric_lines(result.folder, "step") if "kl_ref/k3" in line]
    (warning,) = said
    assert "it runs on the plain path: same results, slower" in warning


def test_it_trains_alike_whichever_engine_is_asked_for(gpt2: str, tmp_path: Path):
    said: list[str] = []

    def trained(engine: str) -> TrainingResult:
        recipe = tiny_recipe(gpt2, training__rounds=1, training__engine=engine)
        return train(recipe, folder=tmp_path / engine, warn=kept_in(said))

    fast, plain = trained("fast"), trained("plain")
    assert len(said) == 1  # none of the plain engine, which was asked for
    assert "it runs on the plain path: same results, slower" in said[0]
    texts = [rollout_texts(result) for result in (fast, plain)]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 8 * 8
    # Engine "fast" takes old log-probabilities from the sampler and leaves rows of advantage 0 out:
    # other roundings (2.3e-7 at most), where a step moves weights by up to 4e-3.
    ours, theirs = weights(fast.checkpoint), weights(plain.checkpoint)
    assert ours.keys() == theirs.keys()
    for name, ours_of_it in ours.items():
        apart = (ours_of_it - theirs[name]).abs()
        if name.endswith("c_attn.bias"):
            # What shifts all keys alike changes no attention: the gradient of their bias is
            # rounding alone, which AdamW makes steps of.
            queries, keys, values = apart.chunk(3)
            assert keys.max() < 4.1e-3, name
            apart = torch.cat([queries, values])
        assert apart.max() < 1e-6, name


def rollout_texts(result: TrainingResult) -> list[str]:
    lines = read_lines(result.folder, "rollouts.jsonl")
    return [rollout["text"] for line in lines for rollout in line["rollouts"]]
