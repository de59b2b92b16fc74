"""Time until an accuracy: ratios of made-up runs, and both sides learning over a tiny model."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from benchmarks import devices, growth, time_to_accuracy
from benchmarks.accuracy_report import draw, print_table, summary
from benchmarks.comparison import trl_setup_of
from benchmarks.exchange import Scratch, load_weights, write_start
from benchmarks.time_to_accuracy import learner, parse, recipe_of, request
from benchmarks.workloads import patterned_rewards
from rich.console import Console
from tests.models import save_tiny
from tests.trl_trainers import tolerated, trl_side_of_sums


def run(side: str, seed: int, *, seconds: float, is_reached: bool = True) -> dict[str, Any]:
    return {
        "side": side,
        "seed": seed,
        "is_reached": is_reached,
        "seconds": seconds,
        "num_rounds": 4,
        "curve": [
            {"rounds": 0, "seconds": 0.0, "accuracy": 0.2},
            {"rounds": 4, "seconds": seconds, "accuracy": 0.6 if is_reached else 0.4},
        ],
    }


RUNS = {
    "trl/0": run("trl", 0, seconds=300.0),
    "gmpo/0": run("gmpo", 0, seconds=60.0),  # 5
    "trl/1": run("trl", 1, seconds=900.0, is_reached=False),
    "gmpo/1": run("gmpo", 1, seconds=90.0),  # at least 10
    "trl/2": run("trl", 2, seconds=200.0),
    "gmpo/2": run("gmpo", 2, seconds=100.0, is_reached=False),  # at most 2
    "trl/3": run("trl", 3, seconds=100.0),  # gmpo is still to come
}


def test_ratios_are_of_seeds_that_both_did_and_say_where_one_never_got_there():
    figures = summary(RUNS)
    assert figures["ratios"] == {
        "0": {"ratio": 5.0, "bound": ""},
        "1": {"ratio": 10.0, "bound": "at least"},
        "2": {"ratio": 2.0, "bound": "at most"},
    }
    assert (figures["ratio_median"], figures["ratio_min"], figures["ratio_max"]) == (5, 2, 10)
    assert figures["num_censored"] == 2
    assert figures["trl"] == {"seconds": 250.0, "num_rounds": 4, "num_reached": 3, "num_runs": 4}
    assert figures["gmpo"]["num_reached"] == 2


def test_the_table_and_the_plot_mark_what_was_not_reached(tmp_path: Path):
    content = {
        "setting": {"target": 0.5, "items": 128},
        "runs": RUNS,
        "summary": summary(RUNS),
    }
    text = StringIO()
    print_table(content, Console(file=text, width=150))
    assert "> 900" in text.getvalue() and "at least 10.00" in text.getvalue()
    assert "5.00 (2.00-10.00) over 3 seeds, of which 2" in text.getvalue()
    draw(content, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("forked")
def test_both_sides_get_the_recipes_step_sizes_and_go_on_from_their_own_weights(tmp_path: Path):
    model = save_tiny(tmp_path / "model")
    arguments = parse(
        ["--json", "x.json", "--model", model, "--dtype", "fp32", "--rounds", "2", "--threads", "1"]
    )
    recipe = recipe_of(arguments)
    scratch = Scratch(folder=tmp_path)
    write_start(model, scratch.start)
    study = time_to_accuracy.Study(
        recipe=recipe,
        trl_setup="fp32/generate",
        target=0.5,
        every_rounds=1,
        threads=1,
        scratch=scratch,
        held_out=None,  # type: ignore[arg-type]  # nothing is evaluated here
        accuracy_before=0.0,
    )
    # 8 steps: 4 of warm-up by quarters of 2e-5, then half a cosine over 4: 1, 0.854, 0.5, 0.146.
    rates = [rate for n in (0, 1) for rate in request(study, "trl", number=n)["learning_rates"]]
    expected = [5e-6, 1e-5, 1.5e-5, 2e-5, 2e-5, 1.7071e-5, 1e-5, 2.929e-6]
    assert rates == pytest.approx(expected, rel=1e-3)
    for side in ("trl", "gmpo"):
        start = load_weights(scratch.start)
        with learner(study, side, 0) as worker:
            figures = worker.ask("learn", **request(study, side, number=0))
            worker.ask("save")
        assert figures["round_seconds"] > 0
        assert load_weights(scratch.learned).keys() == start.keys()


@tolerated
def test_trl_takes_the_step_sizes_it_is_handed_and_keeps_its_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    side, _, scratch = trl_side_of_sums(tmp_path, monkeypatch, max_new_tokens=4)

    # A random model earns nothing from the task.
    def by_place(*, completions: list[Any], **_: Any) -> list[float]:
        return patterned_rewards(len(completions), group_size=4, live_groups=4)

    side._correct = by_place

    def moved(rates: list[float], *, number: int) -> list[float]:
        side.save()
        before = load_weights(scratch.learned)
        side.learn(number=number, learning_rates=rates)
        side.save()
        after = load_weights(scratch.learned)
        return [float((after[name] - before[name]).abs().max()) for name in before]

    assert max(moved([0.0] * 4, number=0)) == 0.0
    # Only the last step moves, by about its size.
    largest = max(moved([0.0, 0.0, 0.0, 1e-2], number=1))
    assert 2e-3 < largest < 3e-2
    steps = {int(state["step"]) for state in side._trainer.optimizer.state.values()}
    assert steps == {8}


def test_a_study_saves_each_run_says_what_was_not_reached_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "times.json"
    command = ["--json", str(path), "--model", save_tiny(tmp_path / "model"), "--dtype", "fp32"]
    command += ["--rounds", "1", "--items", "4", "--seeds", "0", "--threads", "1"]
    assert time_to_accuracy.main([*command, "--sides", "gmpo"]) == 0
    first = json.loads(path.read_text())
    assert list(first["runs"]) == ["gmpo/0"] and first["summary"]["num_seeds"] == 0
    assert time_to_accuracy.main(command) == 0
    # A random model adds no numbers.
    assert "unknown" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert content["runs"]["gmpo/0"] == first["runs"]["gmpo/0"]
    for entry in content["runs"].values():
        assert not entry["is_reached"] and entry["num_rounds"] == 1
        assert [point["rounds"] for point in entry["curve"]] == [0, 1]
        assert entry["seconds"] == entry["rounds"][0]["round_seconds"]
    assert content["summary"]["num_censored"] == 1
    assert path.with_suffix(".png").is_file()


def test_trl_runs_in_the_setting_that_is_named_or_its_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["--json", str(tmp_path / "x.json"), "--threads", "1"]
    assert trl_setup_of(parse([*command, "--dtype", "fp32"])) == "fp32/static_cache"
    assert trl_setup_of(parse([*command, "--dtype", "bf16"])) == "bf16_autocast/generate"
    named = [*command, "--trl", "bf16_weights/generate"]
    assert trl_setup_of(parse([*named, "--dtype", "bf16"])) == "bf16_weights/generate"
    assert time_to_accuracy.main([*named, "--dtype", "fp32"]) == 1
    assert "is not compared with --dtype fp32; choose from fp32/gen" in capsys.readouterr().err


@pytest.mark.parametrize("taken", ["fp32", "bf16"])
def test_the_precision_is_what_this_cpu_takes_unless_it_is_named(
    taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        devices, "choose_dtype", lambda dtype, **_: taken if dtype == "auto" else dtype
    )
    command = ["--json", str(tmp_path / "x.json"), "--threads", "1"]
    assert parse(command).dtype == growth.parse(command).dtype == taken
    assert parse([*command, "--dtype", "fp32"]).dtype == "fp32"


def test_more_items_than_are_held_out_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["--json", str(tmp_path / "x.json"), "--model", save_tiny(tmp_path / "model")]
    assert time_to_accuracy.main([*command, "--dtype", "fp32", "--items", "501"]) == 1
    assert "--items is 501, and the task holds out 500; lower it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "0"], "--target is 0.0; an accuracy above 0 and up to 1 is needed"),
        (["--target", "50"], "--target is 50.0"),
        (["--items", "0"], "--items is 0; at least 1 is needed"),
        (["--every-rounds", "0"], "--every-rounds is 0; at least 1 is needed"),
    ],
)
def test_a_wrong_number_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        parse(["--json", "x.json", *arguments])
    assert message in capsys.readouterr().err
