"""Runs of a model that the fast path does not cover: what they say, and what they train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.models import save_tiny
from tests.tiny_runs import metric_lines, tiny_recipe

from gmpo.training import train


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
    result = train(tiny_recipe(gpt2, **compares), folder=tmp_path / "run", warn=said.append)
    assert [line for line in metric_lines(result.folder, "step") if "kl_ref/k3" in line]
    (warning,) = said
    assert "it runs on the plain path: same results, slower" in warning
