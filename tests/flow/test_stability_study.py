"""A cut of the stability study, small enough for a test: cells end, go on, and repeat exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import stability_study
from scripts.moe_policy import countdown_tokenizer, warmed_up_policy
from scripts.stability_figures import DIGESTED
from scripts.stability_report import markdown, plot, results
from scripts.stability_study import check, claim, dump, finished, run_cell, settings_of
from tests.small_study import CUT, numbers

from gmpo.policy.load import load_model, model_version
from gmpo.tracking import read_lines


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def cell(runs: Path) -> dict[str, Any]:
    return run_cell(CUT, "gmpo-seed0", runs=runs)


def test_the_warm_up_gives_the_same_weights_each_time_and_never_shows_an_item_of_the_run(
    runs: Path, cell: dict[str, Any], tmp_path: Path
):
    first, again = (warmed_up_policy(CUT.task, CUT.warm_up, cache=at) for at in (runs, tmp_path))
    assert first.name == again.name
    versions = [
        model_version(load_model(str(at), device="cpu", dtype="fp32")) for at in (first, again)
    ]
    assert versions[0] == versions[1] == cell["policy"]


def test_a_cell_trains_and_repeats_number_for_number(cell: dict[str, Any], tmp_path: Path):
    assert cell["ended"] == "finished"
    assert cell["figures"]["rounds_survived"] == 3
    assert len(cell["curves"]["reward"]) == 3
    assert cell["figures"]["gradient_norm_deviation"] > 0
    assert numbers(run_cell(CUT, "gmpo-seed0", runs=tmp_path)) == numbers(cell)


def test_a_run_logs_all_that_a_digest_is_of(cell: dict[str, Any], runs: Path):
    lines = read_lines(runs / cell["cell"], "metrics.jsonl")
    logged = {name for line in lines for name in line}
    # A metric that were logged by another name would drop out of it without a word.
    assert logged >= DIGESTED


def test_a_finished_cell_is_read_and_not_run_again(
    cell: dict[str, Any], runs: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stability_study, "train", None)  # calling it would fail
    assert run_cell(CUT, "gmpo-seed0", runs=runs) == cell


def test_another_objective_and_another_seed_give_other_numbers(cell: dict[str, Any], runs: Path):
    others = [run_cell(CUT, name, runs=runs) for name in ("grpo-seed0", "gmpo-seed1")]
    assert len({record["log_digest"] for record in (cell, *others)}) == 3


def test_a_run_whose_reward_is_gone_stops_where_the_definition_says(
    runs: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        stability_study, "collapse_round", lambda rewards, *, start: 2 if len(rewards) > 1 else None
    )
    record = run_cell(CUT, "grpo-seed1", runs=runs)
    assert (record["ended"], record["figures"]["rounds_survived"]) == ("collapsed", 2)
    assert record["figures"]["held_out_greedy_after"] is None


def stored_in(folder: Path, cell: dict[str, Any]) -> Path:
    """A results file of this one cell."""
    file = folder / "stored.json"
    file.write_text(dump(results([cell], settings=settings_of(CUT), seeds=[0])))
    return file


def test_a_stored_cell_is_checked_by_running_it_again(
    cell: dict[str, Any], runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    stored = stored_in(tmp_path, cell)
    assert json.loads(stored.read_text())["cells"] == [cell]
    assert check(CUT, "gmpo-seed0", stored=stored, runs=runs) == 0
    assert "is the same, in native arithmetic" in capsys.readouterr().out
    stored = stored_in(tmp_path, cell | {"log_digest": "0" * 16})
    assert check(CUT, "gmpo-seed0", stored=stored, runs=runs) == 1
    assert "log_digest differ; made with the same versions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arithmetic", "said"),
    [
        ({}, "another kind of processor or version of torch"),
        ({"arithmetic": "portable"}, "other versions of torch or the C library"),
    ],
)
def test_a_cell_that_begins_with_other_weights_is_not_run_and_the_reason_is_told(
    arithmetic: dict[str, str],
    said: str,
    cell: dict[str, Any],
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(stability_study, "train", None)  # calling it would fail
    then = {k: v for k, v in cell["made_with"].items() if k not in ("arithmetic", "processor")}
    made_with = then | {"torch": "1.0"} | arithmetic
    stored = stored_in(tmp_path, cell | {"policy": "of elsewhere", "made_with": made_with})
    assert check(CUT, "gmpo-seed0", stored=stored, runs=runs) == 2
    told = capsys.readouterr().out
    assert said in told
    assert "torch was 1.0, is " in told
    assert "processor was not written down, is " in told


@pytest.mark.parametrize(
    ("stored", "words", "arithmetic"),
    [
        (None, [], "portable"),
        (None, ["--arithmetic", "native"], "native"),
        ({}, [], "native"),  # from before it was written down
        ({}, ["--check", "gmpo-seed0"], "native"),
        ({"arithmetic": "portable"}, ["--check", "gmpo-seed0"], "portable"),
    ],
)
def test_a_results_file_keeps_its_arithmetic_and_a_new_one_is_portable(
    stored: dict[str, str] | None, words: list[str], arithmetic: str, tmp_path: Path
):
    file = tmp_path / "results.json"
    if stored is not None:
        file.write_text(json.dumps({"cells": [{"cell": "gmpo-seed0", "made_with": stored}]}))
    arguments = stability_study.parsed(["--json", str(file), *words])
    assert arguments.arithmetic == arithmetic
    assert arguments.runs.name.endswith("_portable") == (arithmetic == "portable")


def test_results_and_runs_of_two_kinds_of_arithmetic_are_not_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"cells": [{"made_with": {"arithmetic": "portable"}}]}))
    with pytest.raises(SystemExit):
        stability_study.parsed(["--json", str(file), "--arithmetic", "native"])
    assert "was computed in portable arithmetic" in capsys.readouterr().err
    claim(tmp_path / "runs")
    claim(tmp_path / "runs")
    (tmp_path / "runs" / "arithmetic.txt").write_text("portable\n")
    with pytest.raises(SystemExit, match="holds runs in portable arithmetic"):
        claim(tmp_path / "runs")
    (tmp_path / "old" / "gmpo-seed0").mkdir(parents=True)
    claim(tmp_path / "old")
    assert (tmp_path / "old" / "arithmetic.txt").read_text() == "native\n"


def test_what_is_finished_becomes_a_table_and_a_plot(
    cell: dict[str, Any], runs: Path, tmp_path: Path
):
    assert cell in finished(runs)
    report = results([cell], settings=settings_of(CUT), seeds=[0, 1])
    assert "| gmpo | 1 |" in markdown(report)
    plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_a_number_is_one_token_and_so_is_the_rule():
    tokenizer = countdown_tokenizer(100)
    asked = "Make 26 from 13, 5 and 8. Use each number exactly once, with +, -, * and /.\n"
    ids = tokenizer(asked)["input_ids"]
    assert len(ids) == 11
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(tokenizer("(13 + 5) * 8")["input_ids"]) == "( 13 + 5 ) * 8"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "11"], "are not of the study"),
        (["--cell", "gmpo-seed10"], "there is no cell 'gmpo-seed10'"),
        (["--check", "ppo-seed0"], "there is no cell 'ppo-seed0'"),
    ],
)
def test_a_wrong_argument_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        stability_study.parsed(["--json", "x.json", *words])
    assert message in capsys.readouterr().err


def test_experts_are_many_and_one_is_active(runs: Path, cell: dict[str, Any]):
    model = load_model(str(warmed_up_policy(CUT.task, CUT.warm_up, cache=runs)), device="cpu")
    assert (model.config.num_experts, model.config.num_experts_per_tok) == (8, 1)
    gates = [p for name, p in model.named_parameters() if name.endswith("gate.weight")]
    logits = model(torch.randint(0, 100, (2, 12))).logits
    logits.square().mean().backward()
    assert all(gate.grad.abs().sum() > 0 for gate in gates)  # the router learns
