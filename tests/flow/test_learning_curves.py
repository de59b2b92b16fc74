"""Learning curves of both engines over a tiny model, and the rule that says whether they agree."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path

import pytest
from benchmarks import learning_curves
from benchmarks.learning_curves import compared, draw, interval, print_tables
from rich.console import Console
from tests.models import save_tiny
from tests.tiny_runs import tiny_recipe, write_recipe

from gmpo.tracking import provenance


def curves(*differences: list[float]) -> dict[str, list[float]]:
    """A curve of 0.5 for the plain engine, and that and a seed's differences for the fast one."""
    plain = {f"plain/{seed}": [0.5] * len(of) for seed, of in enumerate(differences)}
    fast = {f"fast/{seed}": [0.5 + d for d in of] for seed, of in enumerate(differences)}
    return fast | plain


def test_an_interval_over_three_seeds_is_students():
    # Mean 0.02, deviation 0.01, t(0.975, 2) = 4.3027: half = 4.3027 * 0.01 / sqrt(3) = 0.02484.
    found = interval([0.01, 0.02, 0.03])
    assert found["mean"] == pytest.approx(0.02)
    assert found["high"] - found["mean"] == pytest.approx(0.02484, abs=1e-5)
    assert found["mean"] - found["low"] == pytest.approx(0.02484, abs=1e-5)


@pytest.mark.parametrize(
    ("differences", "agree"),
    [
        # Seeds' means 0.01, 0, -0.01: 0 is inside, and the width is 2 * 0.0248.
        (([0.02, 0.0], [0.01, -0.01], [0.0, -0.02]), True),
        # As wide as ten times that: too wide to say anything.
        (([0.2, 0.0], [0.1, -0.1], [0.0, -0.2]), False),
        # Narrow, and beside 0.
        (([0.05, 0.05], [0.051, 0.051], [0.049, 0.049]), False),
        (([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]), True),
    ],
)
def test_engines_agree_if_the_interval_holds_0_and_is_narrow(
    differences: tuple[list[float], ...], agree: bool
):
    comparison = compared(curves(*differences), widest=0.1)
    assert comparison["agree"] == agree
    text = StringIO()
    print_tables(comparison, Console(file=text, width=200))
    assert ("fast and plain agree" in text.getvalue()) == agree
    assert len(comparison["by_round"]) == 2


@pytest.mark.usefixtures("forked")
def test_the_command_trains_both_engines_once_and_says_whether_they_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = tiny_recipe(save_tiny(tmp_path / "model"))
    path = tmp_path / "curves.json"
    command = ["--recipe", write_recipe(tmp_path / "tiny.toml", recipe), "--json", str(path)]
    command += ["--runs", str(tmp_path / "runs"), "--seeds", "0", "1", "--rounds", "1"]
    command += ["--set", "sampling.prompts_per_round=4", "--widest", "1"]
    # The first round of both engines draws the same tokens, in fp32.
    assert learning_curves.main(command) == 0
    said = capsys.readouterr().out
    assert "fast and plain agree over 2 seeds" in said
    content = json.loads(path.read_text())
    rewards = content["rewards"]
    assert list(rewards) == ["fast/0", "plain/0", "fast/1", "plain/1"]
    assert rewards["fast/0"] == pytest.approx(rewards["plain/0"], abs=0.05)
    assert content["comparison"]["overall"]["mean"] == pytest.approx(0.0, abs=0.05)
    assert path.with_suffix(".png").is_file()
    assert len(set(content["commits"].values())) == 1
    assert "not all runs are of this commit" not in said
    # Without the file, the finished runs are read, one of another commit; the control is made too.
    path.unlink()
    [earlier] = (tmp_path / "runs").glob("*-fast-seed1")
    begin_at(earlier, "0123456789ab")
    assert learning_curves.main([*command, "--control", "64"]) == 0
    content = json.loads(path.read_text())
    curves = content["rewards"]
    assert {name: curves[name] for name in rewards} == rewards
    assert list(curves) == ["fast/0", "plain/0", "control/0", "fast/1", "plain/1", "control/1"]
    said = capsys.readouterr().out
    assert "fast minus control" in said
    assert "0123456789ab: fast/1" in said and "fast/0, plain/0" in said
    assert content["commits"].pop("fast/1") == "0123456789ab"
    assert set(content["commits"]) == set(curves) - {"fast/1"}
    assert set(content["commits"].values()) == {provenance()["commit"]}
    assert content["control"]["overall"]["mean"] == pytest.approx(0.0, abs=0.05)
    [made] = (tmp_path / "runs").glob("*-control64-seed0")
    assert "max_tokens_per_micro_batch = 64\n" in (made / "recipe.toml").read_text()


def begin_at(folder: Path, commit: str) -> None:
    """Have the run's note say that this commit began it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({**provenance(), "commit": commit}))


def test_an_unfinished_run_of_another_commit_does_not_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["--json", str(tmp_path / "curves.json"), "--runs", str(tmp_path / "runs")]
    folder = learning_curves.run_folder("fast", 0, learning_curves.parse(command))
    begin_at(folder, "0123456789ab")
    (folder / "checkpoints" / "round-000001").mkdir(parents=True)
    assert learning_curves.main(command) == 1
    said = capsys.readouterr().err
    assert f"{folder} was begun at commit 0123456789ab and is not finished" in said
    assert "check that commit out, or remove the folder" in said


def studies_of(file: Path) -> list[dict[str, object]]:
    """The options of each call of the study that a file gives, where its results go left out."""
    calls = re.findall(r"-m benchmarks\.learning_curves (.*?)--json", file.read_text(), re.DOTALL)
    return [
        vars(learning_curves.parse([*call.replace("\\\n", " ").split(), "--json", "x.json"]))
        for call in calls
    ]


def test_make_studies_runs_the_documented_study():
    repository = Path(__file__).parents[2]
    [study] = studies_of(repository / "Makefile")
    documented = studies_of(repository / "docs" / "experiments.md")
    assert study in documented
    # The same study in another precision is the only other one.
    assert all({**study, "dtype": other["dtype"]} == other for other in documented)


def test_the_plot_shows_every_run(tmp_path: Path):
    draw(curves([0.0, 0.1], [0.1, 0.0]), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "3"], "--seeds has 1 seed; an interval over seeds needs 2 or more"),
        (["--rounds", "0"], "--rounds is 0; at least 1 is needed"),
        (["--control", "0"], "--control is 0; at least 1 is needed"),
        (["--widest", "0"], "--widest is 0.0; a reward above 0 and up to 1 is needed"),
    ],
)
def test_a_wrong_number_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        learning_curves.parse(["--json", "x.json", *arguments])
    assert message in capsys.readouterr().err
