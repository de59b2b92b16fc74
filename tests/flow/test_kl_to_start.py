"""The KL to the starting model is measured where it is asked for, and changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.models import save_tiny
from tests.tiny_runs import metric_lines, same_weights, tiny_recipe

from gmpo.errors import CheckpointError
from gmpo.recipe import load_recipe
from gmpo.training import train


def test_measuring_the_kl_to_the_start_changes_no_weight(model: str, tmp_path: Path):
    never = train(tiny_recipe(model), folder=tmp_path / "never")
    measured = train(tiny_recipe(model, training__kl_ref_every=2), folder=tmp_path / "measured")
    assert same_weights(never.checkpoint, measured.checkpoint)
    assert not [line for line in metric_lines(never.folder) if "kl_ref/k3" in line]
    # 2 rounds of 4 steps: only the last step of round 2.
    found = [line["step"] for line in metric_lines(measured.folder, "step") if "kl_ref/k3" in line]
    assert found == [8]


# The plain engine runs every row with or without a term. The fast one without a term cuts its
# micro-batches without the dead rows, so that roundings differ.
@pytest.mark.parametrize(("engine", "tolerance"), [("plain", 1e-6), ("fast", 1e-4)])
def test_it_is_what_a_kl_term_of_no_weight_would_log(
    model: str, engine: str, tolerance: float, tmp_path: Path
):
    sampling = {"group_size": 2, "prompts_per_round": 32, "max_new_tokens": 3, "max_length": 64}
    settings = {"training__engine": engine, "training__kl_ref_every": 1, "sampling": sampling}
    # 1e-30 of a gradient is lost in its rounding.
    term = tiny_recipe(model, objective={"kl_coefficient": 1e-30}, **settings)
    by_term = metric_lines(train(term, folder=tmp_path / "term").folder, "step")
    alone = train(tiny_recipe(model, **settings), folder=tmp_path / "alone")
    lines = [line for line in metric_lines(alone.folder, "step") if "kl_ref/k3" in line]
    assert [line["step"] for line in lines] == [4, 8]
    for line in lines:
        expected = by_term[line["step"] - 1]["kl_ref/k3"]
        assert line["kl_ref/k3"] == pytest.approx(expected, rel=tolerance)
        assert line["kl_ref/k3"] > 1e-4
    if engine == "fast":  # some of the step's 16 rollouts are dead
        assert 0 < lines[0]["update/live_rollouts"] < 16


def test_it_is_measured_on_a_step_without_a_live_group(model: str, tmp_path: Path):
    everything_counts = {"weights": {"format": 1.0}, "format_pattern": "(?s).*"}
    recipe = tiny_recipe(model, reward=everything_counts, training__kl_ref_every=2)
    run = train(recipe, folder=tmp_path / "run")
    line = metric_lines(run.folder, "step")[-1]
    assert line["update/live_rollouts"] == 0
    assert line["kl_ref/k3"] == pytest.approx(0, abs=1e-9)  # nothing has moved the policy
    assert metric_lines(run.folder, "round")[-1]["kl_ref/k3"] == line["kl_ref/k3"]


def test_a_run_folder_of_a_version_that_wrote_0_for_nothing_goes_on(model: str, tmp_path: Path):
    recipe = tiny_recipe(model, checkpoint={"every_rounds": 1})
    folder = train(recipe, folder=tmp_path / "run").folder
    shutil.rmtree(folder / "checkpoints" / "round-000002")
    written = folder / "recipe.toml"
    text = written.read_text()
    assert "kl_ref_every" not in text
    written.write_text(text.replace("[training]\n", "[training]\nkl_ref_every = 0\n"))
    train(load_recipe(written), folder=folder, resume=True)
    shutil.rmtree(folder / "checkpoints" / "round-000002")
    train(recipe, folder=folder, resume=True)


def test_a_run_goes_on_only_with_the_model_it_began_from(model: str, tmp_path: Path):
    base = tmp_path / "base"
    shutil.copytree(model, base)
    term, plain = tmp_path / "term", tmp_path / "plain"

    def trained(folder: Path, *, resume: bool, **more: object) -> None:
        recipe = tiny_recipe(str(base), training__rounds=2, checkpoint={"every_rounds": 1}, **more)
        if not resume:
            train(recipe, folder=folder)
            # As if it had been killed in its second round.
            shutil.rmtree(folder / "checkpoints" / "round-000002")
            return
        train(recipe, folder=folder, resume=True)

    measures = {"objective": {"kl_coefficient": 0.1}}
    trained(term, resume=False, **measures)
    trained(plain, resume=False)
    save_tiny(base, seed=1)
    with pytest.raises(CheckpointError, match="measures KL to another base model than"):
        trained(term, resume=True, **measures)
    trained(plain, resume=True)  # all that it needs is in the checkpoint
    shutil.rmtree(base)
    shutil.copytree(model, base)
    trained(term, resume=True, **measures)
