"""What a run says it will need, what it then took, and what it refuses to start."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.commands import gmpo, refusal
from tests.models import character_tokenizer
from tests.tiny_runs import same_weights, tiny_recipe
from transformers import AutoModelForCausalLM

from gmpo import GMPOConfig, GMPOTrainer, outlook
from gmpo.errors import ConfigError
from gmpo.training import Report, train


def starts_with_a_letter_or_digit(completions: list[str], **_: Any) -> list[float]:
    return [float(text[:1].isalnum()) for text in completions]


def forecasts(reports: list[Report]) -> list[Report]:
    return [report for report in reports if report.stage == "forecast"]


def test_a_run_says_what_it_needs_before_anything_else_and_compares_after_its_first_round(
    model: str, tmp_path: Path
):
    reports: list[Report] = []
    train(tiny_recipe(model), folder=tmp_path / "run", report=reports.append)
    before, after = forecasts(reports)
    assert reports[0] is before
    assert re.fullmatch(
        r"forecast: up to \d\.\d\d GiB of memory( \(.* were free at the start\))?; about \S+ \w+"
        r"( to \S+ \w+)? a round and \S+ \w+( to \S+ \w+)? in all, by a short trial and if every "
        r"completion runs to its limit",
        before.sentence,
    )
    assert [report.stage for report in reports].index("round") < reports.index(after)
    assert after.round == 1
    content = json.loads((tmp_path / "run" / "forecast.json").read_text())
    needs, time, measured = content["memory"], content["time"], content["measured"]
    assert measured["round"] == 1
    assert 0.5 < measured["peak_gib"] / needs["peak_gib"] < 20  # tests before this one took memory
    low, high = time["round_seconds"]
    assert 0 < low <= high
    # Two rounds, and one evaluation of 5 items before and one after.
    assert time["run_seconds"][0] == pytest.approx(2 * low + time["evaluation_seconds"][0])
    assert f"{measured['peak_gib']:.2f} GiB of memory in round 1" in after.sentence


def test_the_trial_changes_nothing(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = tiny_recipe(model)
    with_trial = train(config, folder=tmp_path / "with")
    monkeypatch.setattr(outlook.Outlook, "announce", lambda *_, **__: None)
    without = train(config, folder=tmp_path / "without")
    assert same_weights(with_trial.checkpoint, without.checkpoint)


def test_a_resumed_run_forecasts_what_is_left_and_a_finished_one_nothing(
    model: str, tmp_path: Path
):
    config = tiny_recipe(model, checkpoint={"every_rounds": 1, "keep": 5})
    train(config, folder=tmp_path / "run")
    finished: list[Report] = []
    train(config, folder=tmp_path / "run", resume=True, report=finished.append)
    assert forecasts(finished) == []
    for name in ("evaluations.jsonl", "checkpoints/round-000002/state.json"):
        (tmp_path / "run" / name).unlink()
    resumed: list[Report] = []
    train(config, folder=tmp_path / "run", resume=True, report=resumed.append)
    before, after = forecasts(resumed)
    assert (before.round, after.round) == (1, 2)
    assert "more at this pace" not in after.sentence


def test_a_run_beyond_the_free_memory_is_refused_before_anything_is_loaded(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(outlook, "free_bytes", lambda _: 2**20)
    with pytest.raises(ConfigError, match=r"the run needs about .* GiB of memory and 0\.00 GiB"):
        train(tiny_recipe(model), folder=tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError):
        train(tiny_recipe(model), folder=tmp_path / "mine")
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]
    anyway = tiny_recipe(model, training__refuse_beyond_memory=False)
    train(anyway, folder=tmp_path / "run")


def test_the_command_refuses_in_one_line(model: str, recipe: str, tmp_path: Path):
    settings = ("--set", f"model.name={model}", "--set", "sampling.max_rows=1000000000")
    said = refusal("train", recipe, "--run", tmp_path / "run", *settings)
    assert re.search(r"sampling\.max_rows = \d+ would fit, or set training\.refuse_beyond_", said)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_what_would_be_refused_says_so_and_fails(model: str, recipe: str):
    settings = ("--set", f"model.name={model}", "--set", "sampling.max_rows=1000000000")
    shown = gmpo("train", recipe, "--dry-run", *settings)
    assert shown.exit_code == 2
    assert "max_rows = 1000000000" in shown.stdout
    assert re.search(r"cache\W+\d", shown.stdout)
    told = " ".join(shown.stderr.split())
    assert re.search(
        r"the run would be refused: the run needs about \d.* sampling\.max_rows = \d+ would fit",
        told,
    )
    as_json = gmpo("train", recipe, "--dry-run", "--json", *settings)
    assert as_json.exit_code == 2
    assert json.loads(as_json.stdout)["refusal"].startswith("the run needs about ")
    fits = gmpo("train", recipe, "--dry-run", "--json", *settings[:2])
    assert fits.exit_code == 0
    assert json.loads(fits.stdout)["refusal"] is None


def test_a_group_of_a_million_is_refused_before_anything_is_loaded(
    model: str, recipe: str, tmp_path: Path
):
    said = refusal(
        *("train", recipe, "--run", tmp_path / "run", "--set", f"model.name={model}"),
        *("--set", "sampling.group_size=1000000000"),
    )
    assert re.search(
        r"a round's rollouts \d{5,}\.\d\d, .*sampling\.group_size = \d+ would fit", said
    )


def test_a_model_in_memory_has_a_forecast_which_is_printed_unless_callbacks_are_given(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def trained(name: str, **changes: Any) -> GMPOTrainer:
        trainer = GMPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model),
            tokenizer=character_tokenizer(),
            config=GMPOConfig(batch_size=16, max_length=64, output_dir=str(tmp_path / name)),
            train_dataset=[{"prompt": f"What is {a} + {b}?"} for a in range(4) for b in range(4)],
            reward=starts_with_a_letter_or_digit,
            warn=lambda _: None,
            **changes,
        )
        trainer.train()
        return trainer

    quiet = trained("quiet", callbacks=())
    assert "forecast" not in capsys.readouterr().out
    content = json.loads((tmp_path / "quiet" / "forecast.json").read_text())
    weights = sum(weight.nbytes for weight in quiet.model.parameters())
    assert content["memory"]["loaded_gib"] == weights / 2**30
    assert content["time"]["not_counted"] == ["reward functions"]
    assert content["measured"]["round"] == 1
    trained("printed")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("forecast: up to ")
    assert printed[0].endswith("if every completion runs to its limit, without reward functions")
    assert any(line.startswith("measured: ") for line in printed)
