"""Pictures are drawn for whole, short and broken runs, and show the figures they should."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gmpo.errors import RunFolderError
from gmpo.plots import _PANELS, _items_during, _read, _single, _trailing_mean, plot_run
from gmpo.recipe import dump_recipe, load_recipe
from gmpo.tracking import RunFolder

NAMES = ["reward", "held_out", "ratio", "entropy", "clip", "groups", "overview"]


def write_rounds(run: RunFolder, num_rounds: int) -> None:
    """Rounds of two steps whose second has ratios 0.5 to 2 and clips 1 % low, 3 % high."""
    for number in range(1, num_rounds + 1):
        step = {
            "ratio/min": 0.5,
            "ratio/max": 2.0,
            "ratio/log_q01": -0.1,
            "ratio/log_q99": 0.1,
            "clip/low_fraction": 0.01,
            "clip/high_fraction": 0.03,
        }
        run.log_metrics("step", {"update/loss": 0.0}, round=number, step=2 * number - 1)
        run.log_metrics("step", step, round=number, step=2 * number)
        values = {
            "rollout/reward": number / num_rounds,
            "rollout/entropy": 1 / number,
            "rollout/groups": 4.0,
            "rollout/dead_groups": 1.0,
            "rollout/truncated_fraction": 0.5,
        }
        run.log_metrics("round", values, round=number, step=2 * number)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.write_text("recipe.toml", dump_recipe(load_recipe("quickstart")))
    write_rounds(run, 12)
    values = {"evaluation/accuracy": 0.4}
    run.log_metrics("evaluation", values, round=10, step=20)
    for stage, number, accuracy in (("before", 0, 0.2), ("after", 12, 0.8)):
        figures = {"accuracy": accuracy, "interval_95": [accuracy - 0.1, accuracy + 0.1]}
        results = [{"name": name, **figures, "items": 60} for name in ("greedy", "sampled")]
        record = {"stage": stage, "round": number, "results": results}
        run.log_record("evaluations.jsonl", record)
    return run


def panel(name: str, run: RunFolder) -> Axes:
    """The panel alone, drawn, so that nothing fails later when a picture is written."""
    figure = Figure()
    ax = figure.add_subplot()
    _PANELS[name](ax, _read(run.path))
    figure.draw_without_rendering()
    return ax


def legend(ax: Axes) -> list[str]:
    drawn = ax.get_legend()
    return [] if drawn is None else [text.get_text() for text in drawn.get_texts()]


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_every_picture_decodes_is_wide_enough_and_is_not_blank(run: RunFolder):
    paths = plot_run(run.path, run.path / "plots")
    assert [path.name for path in paths] == [f"{name}.png" for name in NAMES]
    for path in paths:
        pixels = image.imread(path)
        assert pixels.shape[1] >= 1000
        # More than white and black: some pixels have a colour of the palette.
        assert pixels.std() > 0.05
        colourful = np.ptp(pixels[..., :3], axis=-1) > 0.3
        assert colourful.sum() > 100


def test_every_panel_has_a_title_and_named_axes(run: RunFolder):
    for name in _PANELS:
        ax = panel(name, run)
        assert ax.get_title(loc="left") and ax.get_xlabel() and ax.get_ylabel()


def test_the_reward_panel_shows_each_round_and_the_mean_of_ten(run: RunFolder):
    points, mean = panel("reward", run).lines
    np.testing.assert_allclose(points.get_ydata(), np.arange(1, 13) / 12)
    smooth = np.asarray(mean.get_ydata())
    assert np.isnan(smooth[:9]).all()
    # Rounds 3 to 12: their numbers have mean 7.5.
    assert smooth[-1] == pytest.approx(7.5 / 12)


def test_a_trailing_mean_leaves_unknown_values_out():
    means = _trailing_mean(np.array([1.0, math.nan, 3.0, math.nan, math.nan]), 2)
    np.testing.assert_allclose(means, [math.nan, 1.0, 3.0, 3.0, math.nan])


def test_the_accuracy_panel_states_how_many_items_were_asked(run: RunFolder):
    # 100 items in the recipe, but the task has only 60.
    expected = ["greedy, during (n = 60)", "greedy (n = 60)", "sampled (n = 60)"]
    assert legend(panel("held_out", run)) == expected


def test_the_items_asked_during_training_are_the_fewest_of_the_limits(tmp_path: Path):
    run = RunFolder(tmp_path)
    write_rounds(run, 1)
    assert _items_during(_read(run.path)) is None
    for override, items in (
        ("evaluation.items_during=30", 30),
        ("evaluation.items=20", 20),
        ("task.held_out_items=10", 10),
    ):
        run.write_text("recipe.toml", dump_recipe(load_recipe("quickstart", [override])))
        assert _items_during(_read(run.path)) == items


def test_the_ratio_panel_shows_the_range_and_the_clip_of_the_recipe(run: RunFolder):
    ax = panel("ratio", run)
    assert ax.get_yscale() == "log"
    extremes, quantiles = (bars.get_segments() for bars in ax.collections)
    np.testing.assert_allclose(np.array(extremes[1]), [[2, 0.5], [2, 2]])
    np.testing.assert_allclose(np.array(quantiles[1])[:, 1], np.exp([-0.1, 0.1]))
    bounds = [np.asarray(line.get_ydata())[0] for line in ax.lines]
    np.testing.assert_allclose(bounds, np.exp([-0.4, 0.4]))
    assert "clip: 0.67032 and 1.4918" in legend(ax)


@pytest.mark.parametrize(
    ("objective", "label"),
    [
        ("gspo", "clip of the sequence's ratio: 0.9997 and 1.0004"),
        ("grpo", "clip: 0.8 and 1.2"),
        ("gmpo_no_clip", None),
    ],
)
def test_the_clip_drawn_is_the_objectives_own(run: RunFolder, objective: str, label: str | None):
    recipe = load_recipe("quickstart", [f"objective.name={objective}"])
    run.write_text("recipe.toml", dump_recipe(recipe))
    assert [text for text in legend(panel("ratio", run)) if "clip" in text] == (
        [] if label is None else [label]
    )


def test_the_clip_panel_shows_high_upwards_and_low_downwards(run: RunFolder):
    ax = panel("clip", run)
    high, low = (bars.get_segments() for bars in ax.collections)
    assert np.array(high[1])[1, 1] == 0.03
    assert np.array(low[1])[1, 1] == -0.01
    assert {"high clip (mean 3 %)", "low clip (mean 1 %)"} <= set(legend(ax))


def test_the_groups_panel_shows_shares_of_groups_and_completions(run: RunFolder):
    dead, _, cut, _ = panel("groups", run).lines
    assert set(np.asarray(dead.get_ydata())) == {0.25}
    assert set(np.asarray(cut.get_ydata())) == {0.5}


def test_a_figure_that_was_not_measured_is_said_so(tmp_path: Path):
    run = RunFolder(tmp_path)
    run.log_metrics("round", {"time/rollout_seconds": 1.0}, round=1, step=1)
    for name in _PANELS:
        assert texts(panel(name, run)) == ["not measured"]


def test_one_round_and_figures_that_are_not_finite_are_drawn(tmp_path: Path):
    run = RunFolder(tmp_path)
    write_rounds(run, 1)
    broken = {"ratio/min": 0.0, "ratio/max": math.inf, "clip/low_fraction": math.nan}
    run.log_metrics("step", broken, round=2, step=3)
    run.log_metrics("round", {"rollout/reward": math.nan}, round=2, step=4)
    drawn = plot_run(run.path, tmp_path / "elsewhere" / "plots")
    assert [path.name for path in drawn if path.is_file()] == [f"{name}.png" for name in NAMES]
    empty = [name for name in _PANELS if texts(panel(name, run))]
    assert empty == ["held_out"]


def test_a_ratio_that_was_always_one_is_drawn(tmp_path: Path):
    run = RunFolder(tmp_path)
    values = {"ratio/min": 1.0, "ratio/max": 1.0, "ratio/log_q01": 0.0, "ratio/log_q99": 0.0}
    run.log_metrics("step", values, round=1, step=1)
    run.log_metrics("round", {"rollout/reward": 0.0}, round=1, step=1)
    assert texts(panel("ratio", run)) == []


def test_a_model_named_by_a_long_path_with_dollar_signs_is_drawn(run: RunFolder):
    name = "/models/$x/" + "a_b^" * 30 + "$"
    recipe = load_recipe("quickstart", [f'model.name="{name}"'])
    run.write_text("recipe.toml", dump_recipe(recipe))
    figure = _single(_PANELS["reward"], _read(run.path))
    figure.draw_without_rendering()
    assert figure.get_suptitle().startswith("…")
    total = recipe.training.rounds
    assert figure.get_suptitle().endswith(f"$, gmpo on arithmetic, 12 of {total} rounds")


def test_a_run_that_does_not_exist_is_named_and_not_created(tmp_path: Path):
    with pytest.raises(RunFolderError, match="absent does not exist"):
        plot_run(tmp_path / "absent", tmp_path / "plots")
    assert not (tmp_path / "absent").exists()


def test_a_run_without_a_finished_round_says_so(tmp_path: Path):
    with pytest.raises(RunFolderError, match="no finished round yet to plot"):
        plot_run(tmp_path, tmp_path / "plots")


def test_a_target_that_cannot_be_written_is_named(run: RunFolder, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"plots cannot be written to .*file"):
        plot_run(run.path, tmp_path / "file" / "plots")
