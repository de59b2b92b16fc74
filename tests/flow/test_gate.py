"""`gmpo gate`: two models, or what was stored of them, and one answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.commands import gmpo, jsonl, refusal
from tests.models import save_tiny
from tests.registries import model_folder
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


def test_small_losses_are_held_against_an_earlier_model(tmp_path: Path):
    first, old, new = (
        stored(tmp_path / name, right, model=name)
        for name, right in (("first", 560), ("old", 530), ("new", 510))
    )
    assert gmpo("gate", old, new).exit_code == 0
    done = gmpo("gate", old, new, "--anchor", first)
    assert done.exit_code == 3
    assert "fail: -2.0 points" in done.stdout
    assert "against anchor first, overall: a drop is shown" in done.stdout
    told = json.loads(gmpo("gate", old, new, "--anchor", first, "--json").stdout)
    assert told["anchor"]["versions"] == {"amc": "first"}
    assert gmpo("gate", first, old, "--anchor", new).exit_code == 0
    again = stored(tmp_path / "again", 530, model="old")
    assert "name an earlier one" in refusal("gate", old, new, "--anchor", again)


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
    # Against a version that serves no more, a decision is kept and promotes nothing.
    done = gmpo("gate", *folders, "--store", store, "--name", "bot", "--json")
    assert f"'bot' is served by {new.version}, not by {old.version}" in done.stderr
    assert json.loads(done.stdout)["champion_revision"] is None
    gmpo("registry", "rollback", "bot", "--reason", "slow", "--store", store)
    promote = ("registry", "promote", "bot", new.version, "--store", store)
    assert "does not say when its champion" in refusal(*promote)
    done = gmpo("gate", *folders, "--store", store, "--name", "bot", "--json")
    assert json.loads(done.stdout)["champion_revision"] == 3
    assert gmpo(*promote).exit_code == 0
    absent = str(tmp_path / "absent.db")
    assert "absent.db" in refusal("gate", *folders, "--store", absent, "--name", "bot")
    assert not Path(absent).exists()


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


def test_a_registered_version_whose_files_are_damaged_or_gone_is_named(tmp_path: Path):
    store = str(tmp_path / "store.db")
    with open_store(store) as opened:
        registry = Registry(opened, tmp_path / "models")
        old, new = (
            registry.add(model_folder(tmp_path / str(value), value), name="bot")
            for value in (1.0, 2.0)
        )
    gate = ("gate", old.version, new.version, "--store", store, "--name", "bot", "--suite", "amc")
    (Path(new.path) / "config.json").write_text("{}")
    assert f"{new.version} at {new.path} is damaged: config.json was changed" in refusal(*gate)
    shutil.rmtree(old.path)
    assert f"{old.version} at {old.path} is damaged: its folder is missing; add" in refusal(*gate)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_model_that_is_not_there_is_refused_before_any_is_asked(
    models: tuple[Path, Path], tmp_path: Path, place: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("gmpo.suites.runs.ask_suites", lambda *_, **__: pytest.fail("it was asked"))
    named: list[str | Path] = [*models, stored(tmp_path / "stored", 500)]
    named[place] = tmp_path / "absent"
    said = refusal("gate", *named[:2], "--anchor", named[2], "--suite", "svamp")
    assert said.startswith(f"cannot load model {str(tmp_path / 'absent')!r}: there is no such")
    assert "or a folder with config.json and weights" in said


def test_a_model_is_not_held_against_itself(tmp_path: Path):
    old = stored(tmp_path / "old", 500, model="a")
    assert "nothing to decide" in refusal("gate", old, old)
    assert "nothing to decide" in refusal("gate", old, stored(tmp_path / "again", 500, model="a"))
