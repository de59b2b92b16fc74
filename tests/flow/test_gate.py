"""`gmpo gate`: two models, or what was stored of them, and one answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.commands import gmpo, jsonl, refusal
from tests.models import save_tiny
from tests.suite_outcomes import greedy

from gmpo.model_files import weights_version
from gmpo.outcomes import write_outcomes
from gmpo.registry import Registry
from gmpo.store import open_store


def stored(folder: Path, right: int, *, model: str = "gone") -> Path:
    """What a model made of 1,000 items, so many of them right."""
    one = greedy("m", set(range(right)), 1000)
    write_outcomes(folder, type(one)(**{**vars(one), "model": model}), place=0)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return tuple(Path(save_tiny(folder / str(seed), seed=seed)) for seed in (0, 1))  # type: ignore[return-value]


def test_stored_outcomes_are_decided_on(tmp_path: Path):
    old = stored(tmp_path / "old", 500, model="first")
    done = gmpo("gate", old, stored(tmp_path / "new", 530, model="second"))
    assert done.exit_code == 0, done.stderr
    assert "pass: +3.0 points" in done.stdout and "length" in done.stdout
    worse = gmpo("gate", old, stored(tmp_path / "bad", 400, model="third"), "--json")
    assert worse.exit_code == 3
    told = json.loads(worse.stdout)
    assert (told["outcome"], told["champion"], told["candidate"]) == ("fail", "first", "third")
    strict = ("--policy", "min_items=2000", "--policy", "growth_limits.length=1.2")
    few = gmpo("gate", old, tmp_path / "new", *strict, "--json")
    assert few.exit_code == 3
    told = json.loads(few.stdout)
    assert told["outcome"] == "inconclusive" and told["overall"]["items_needed"] == 2000
    assert told["guardrails"][0]["limit"] == 1.2


def test_from_the_gate_to_the_registry(models: tuple[Path, Path], tmp_path: Path):
    store = str(tmp_path / "store.db")
    with open_store(store) as opened:
        registry = Registry(opened, tmp_path / "models")
        old, new = (registry.add(model, name="bot") for model in models)
        registry.adopt("bot", old.version, reason="first")
    folders = (
        stored(tmp_path / "old", 500, model=old.path),
        stored(tmp_path / "new", 520, model=str(models[1])),
    )
    done = gmpo("gate", *folders, "--store", store, "--name", "bot")
    assert done.exit_code == 0, done.stderr
    promoted = gmpo("registry", "promote", "bot", new.version[:6], "--store", store)
    assert promoted.exit_code == 0, promoted.stderr
    with open_store(store) as opened:
        assert opened.champion("bot").version == weights_version(models[1])


def test_a_decision_is_refused_before_anything_is_asked_where_it_could_not_be_kept(
    models: tuple[Path, Path], tmp_path: Path
):
    store = str(tmp_path / "store.db")
    with open_store(store) as opened:
        Registry(opened, tmp_path / "models").add(models[0], name="bot")
    message = refusal("gate", "none", "either", "--store", store, "--name", "bto")
    assert message == (
        f"store {store} has no model 'bto', so --name is no place for a decision; it has bot"
    )


def test_models_are_asked_suites_and_safety_sets(models: tuple[Path, Path], tmp_path: Path):
    store = str(tmp_path / "store.db")
    with open_store(store) as opened:
        registry = Registry(opened, tmp_path / "models")
        old, new = (registry.add(model, name="bot") for model in models)
    jsonl(
        tmp_path / "amc.jsonl",
        [{"id": f"q{n}", "problem": f"{n}+1", "answer": str(n + 1)} for n in range(6)],
    )
    done = gmpo(
        "gate", old.version[:8], new.version[:8], "--store", store, "--name", "bot",
        "--suite", "amc", "--data", tmp_path, "--max-tokens", "4", "--set", "model.dtype=fp32",
        "--safety", "canaries=0.01", "--safety-prompts", "20", "--json",
    )  # fmt: skip
    assert done.exit_code == 3, done.stderr
    told = json.loads(done.stdout)
    assert told["outcome"] == "inconclusive"
    assert (told["champion"], told["candidate"]) == (old.version, new.version)
    (canaries,) = told["safety"]
    assert (canaries["num_prompts"], canaries["num_violations"]) == (20, 0)
    assert sum(asked for asked, _ in canaries["strata"].values()) == 20
    assert "0 of 20" in told["sentence"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--safety", "manners=0.1"), "its sets are canaries"),
        (("--safety", "canaries=few"), "write SET=LIMIT"),
        (("--policy", "margin=0.1"), "unknown setting 'margin'; allowed: ['degradation_limit'"),
        (("--policy", "alpha"), "write KEY=VALUE"),
        (("--policy", "alpha=0.9"), "less than 0.5"),
        (("--store", "x.db"), "belong together"),
        (("--samples", "4"), "would do nothing"),
    ],
)
def test_refusals(options: tuple[str, ...], said: str, tmp_path: Path):
    old, new = stored(tmp_path / "old", 500, model="a"), stored(tmp_path / "new", 500, model="b")
    assert said in refusal("gate", old, new, *options)


def test_a_model_is_not_held_against_itself(tmp_path: Path):
    old = stored(tmp_path / "old", 500, model="a")
    assert "nothing to decide" in refusal("gate", old, old)
    assert "nothing to decide" in refusal("gate", old, stored(tmp_path / "again", 500, model="a"))
