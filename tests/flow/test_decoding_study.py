"""The decoding study on two tiny models: its table, and one mixture's weights at a time."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
from scripts import decoding_study
from tests.models import save_tiny
from tests.tiny_runs import tiny_recipe, write_recipe

from gmpo.decoding import build_mixture_sampler
from gmpo.sampler.local import LocalSampler
from gmpo.tracking import provenance


def test_each_mixtures_sampler_is_gone_before_the_next_is_built(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    built: list[weakref.ref[LocalSampler]] = []

    def watched(*models: Any, **settings: Any) -> LocalSampler:
        assert [sampler() for sampler in built] == [None] * len(built)
        sampler = build_mixture_sampler(*models, **settings)
        built.append(weakref.ref(sampler))
        return sampler

    monkeypatch.setattr(decoding_study, "build_mixture_sampler", watched)
    recipe = write_recipe(tmp_path / "tiny.toml", tiny_recipe("no model", model__name=model))
    other = save_tiny(tmp_path / "other", seed=1)
    file = tmp_path / "study.json"
    words = ["--items", "5", "--weights", "0.5", "--draws", "2", "--json", str(file)]
    assert decoding_study.main([recipe, model, other, *words]) == 0
    assert len(built) == 3
    report = json.loads(file.read_text())
    assert [row["weight"] for row in report["mixtures"]] == [0.0, 0.5, 1.0]
    places = [(row["model"], row["n"]) for row in report["best_of"]]
    assert places == [("first", 1), ("first", 2), ("second", 1), ("second", 2)]
    assert report["made_with"] == provenance()
