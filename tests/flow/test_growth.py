"""Growth curves of a tiny model, and what slopes say of made-up ones."""

from __future__ import annotations

import json
import math
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from benchmarks import growth
from benchmarks.growth_report import draw, growth_of, print_tables, slope
from rich.console import Console
from tests.models import save_tiny


def point(curve: str, group_size: int, *, prompt: int, seconds: float) -> dict[str, Any]:
    """4 prompts, completions of 32 tokens."""
    figures = {"median": seconds, "min": seconds, "max": seconds}
    return {
        "curve": curve,
        "value": group_size,
        "completion_length": 32,
        "completion_tokens": 4 * group_size * 32,
        "prompt_tokens": prompt,
        "rollout_seconds": figures,
        "update_seconds": figures,
        "peak_gib": figures,
    }


def side(*, behind_long: float) -> dict[str, dict[str, Any]]:
    """Behind prompts of 48 tokens a further member costs 0.128 s, behind 528 so many times it."""
    points = [
        *(point("group", n, prompt=48, seconds=1 + 0.128 * n) for n in (2, 4, 8)),
        *(
            point("group, long prompts", n, prompt=528, seconds=2 + 0.128 * behind_long * n)
            for n in (2, 4)
        ),
    ]
    return {str(number): each for number, each in enumerate(points)}


def test_a_slope_is_of_a_thousand_completion_tokens():
    # A member of each of 4 groups is 4 * 32 = 128 tokens: 0.128 s each.
    short = [each for each in side(behind_long=1).values() if each["curve"] == "group"]
    assert slope(short, "update_seconds") == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("behind_long", "follows"),
    [
        (1.0, "completion tokens"),
        (2.6, "completion tokens"),
        # (528 + 32) / (48 + 32) = 7 is what running the prompt each time gives; sqrt(7) = 2.65.
        (2.7, "group x prompt"),
        (7.0, "group x prompt"),
    ],
)
def test_slopes_behind_long_prompts_say_what_a_figure_grows_with(behind_long: float, follows: str):
    grown = growth_of(side(behind_long=behind_long), "update_seconds")
    assert grown is not None
    assert grown.expected == pytest.approx(7.0)
    assert grown.ratio == pytest.approx(behind_long)
    assert grown.follows == follows


def test_no_growth_is_said_so_and_a_single_point_has_none():
    flat = {k: v | {"update_seconds": {"median": 1.0}} for k, v in side(behind_long=1).items()}
    grown = growth_of(flat, "update_seconds")
    assert grown is not None
    assert math.isnan(grown.ratio) == grown.follows.startswith("neither") == (grown.short <= 0)
    assert growth_of({"0": point("group", 2, prompt=48, seconds=1.0)}, "update_seconds") is None


def test_tables_and_plot_show_both_sides(tmp_path: Path):
    text = StringIO()
    content = {"gmpo": side(behind_long=1), "trl": side(behind_long=7)}
    print_tables(content, Console(file=text, width=200))
    assert "TRL without vLLM" in text.getvalue()
    assert "completion tokens" in text.getvalue() and "group x prompt" in text.getvalue()
    draw(content, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("forked")
def test_the_command_measures_every_point_once_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "growth.json"
    command = ["--json", str(path), "--model", save_tiny(tmp_path / "model"), "--quick"]
    command += ["--dtype", "fp32", "--threads", "1", "--repeats", "1"]
    few = [p for p in growth.curves(command[3], is_quick=True) if p.value == 2]
    monkeypatch.setattr(growth, "curves", lambda model, *, is_quick: few)
    assert growth.main(command) == 0
    assert "grows with completion tokens" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert list(content["gmpo"]) == ["group 2", "group, long prompts 2"]
    for entry in content["gmpo"].values():
        assert entry["completion_tokens"] == 4 * entry["value"] * 32
        assert min(entry[figure]["median"] for figure in growth.FIGURES) > 0
    assert path.with_suffix(".png").is_file()
    before = path.read_text()
    assert growth.main(command) == 0
    assert path.read_text() == before


@pytest.mark.usefixtures("forked")
def test_trl_draws_completions_of_the_asked_length_too(tmp_path: Path):
    path = tmp_path / "growth.json"
    model = save_tiny(tmp_path / "model")
    arguments = growth.parse(["--json", str(path), "--model", model, "--dtype", "fp32"])
    arguments.threads = 1
    scratch = growth.Scratch(folder=tmp_path)
    growth.write_start(model, scratch.start)
    results = growth.Results(path, {})
    point = growth.trl_points(growth.curves(model, is_quick=True), is_quick=True)[0]
    growth.measure(point, "trl", arguments, results, scratch)
    entry = json.loads(path.read_text())["trl"]["group 2"]
    assert entry["completion_tokens"] == 4 * 2 * 32


def test_completions_that_ended_early_are_refused():
    point = growth.curves("m")[0]
    assert (point.curve, point.value) == ("group", 2)
    with pytest.raises(growth.WorkerFailed, match=r"\[255\] completion tokens, and 256 were"):
        growth.entry(point, [{"tokens": 255, "prompt_tokens": 40}])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "--repeats is 0; at least 1 is needed"),
        (["--threads", "0"], "--threads 0 must lie in 1 to"),
    ],
)
def test_a_wrong_number_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        growth.parse(["--json", "x.json", *arguments])
    assert message in capsys.readouterr().err
