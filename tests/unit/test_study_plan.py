"""Plans of studies: which recipe each cell has, and which plans are refused."""

from __future__ import annotations

import fcntl
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tests.studies import plan_of
from tests.tiny_runs import tiny_recipe, write_recipe

from gmpo.errors import ConfigError, RunFolderError, StudyError
from gmpo.guard_config import GuardConfig
from gmpo.recipe import load_recipe
from gmpo.study import open_study, run_study
from gmpo.study.plan import StudyPlan, load_plan, make_plan, parse_seeds, plan_differences
from gmpo.tuning.plan import TuningOptions, make_tuning_plan, open_tuning


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    return write_recipe(tmp_path / "tiny.toml", tiny_recipe("no model", model__dtype="auto"))


def test_cells_are_seeds_times_arms_and_differ_in_nothing_else(recipe: str):
    plan = plan_of(recipe, seeds=[3, 1])
    cells = list(plan.cells())
    assert [(cell.seed, cell.arm) for cell in cells] == [
        (3, "grpo"),
        (3, "gmpo"),
        (1, "grpo"),
        (1, "gmpo"),
    ]
    grpo, gmpo = cells[0].recipe, cells[1].recipe
    assert gmpo.objective.name == "gmpo"
    assert grpo == gmpo.model_copy(update={"objective": grpo.objective})
    assert cells[2].recipe == grpo.model_copy(
        update={"training": grpo.training.model_copy(update={"seed": 1})}
    )


def test_each_arm_has_its_objectives_own_clips(recipe: str):
    plan = plan_of(recipe, objectives=["grpo", "gmpo", "gspo"])
    clips = {arm.label: arm.recipe.objective.clips() for arm in plan.arms}
    assert clips["grpo"] == {"clip_low": 0.2, "clip_high": 0.2}
    assert clips["gmpo"] == {"clip_low": 0.4, "clip_high": 0.4}
    assert clips["gspo"] == {"clip_low": 3e-4, "clip_high": 4e-4}


def test_a_recipes_clips_are_those_of_its_own_objective(tmp_path: Path):
    objective = {"name": "gmpo", "clip_low": 0.7, "clip_negative_high": 2.0, "advantage_eps": 0.1}
    own = write_recipe(tmp_path / "own.toml", tiny_recipe("no model", objective=objective))
    grpo, gmpo = (arm.recipe.objective for arm in plan_of(own).arms)
    assert gmpo.clips() == {"clip_low": 0.7, "clip_high": 0.4, "clip_negative_high": 2.0}
    assert grpo.clips() == {"clip_low": 0.2, "clip_high": 0.2}
    assert grpo.advantage_eps == gmpo.advantage_eps == 0.1


def test_one_objective_with_two_clips_is_two_arms(recipe: str):
    plan = plan_of(
        recipe,
        objectives=["grpo", "wide=grpo"],
        arm_overrides=["wide:objective.clip_high=0.49", "wide:objective.clip_low=0.33"],
    )
    bounds = [arm.recipe.objective.ratio_bounds() for arm in plan.arms]
    assert bounds[0] == pytest.approx((0.8, 1.2))
    assert bounds[1] == pytest.approx((0.67, 1.49))


def test_a_plan_survives_its_file(recipe: str):
    plan = plan_of(recipe, target_reward=0.5, quick=True, threads=3)
    plan = replace(plan, num_seeds_before=(2, 3))
    assert StudyPlan.from_dict(plan.as_dict(), source="here") == plan


def test_quick_makes_a_recipe_small_and_leaves_what_was_asked():
    plan = make_plan(
        "quickstart",
        objectives=["grpo", "gmpo"],
        seeds=[0, 1],
        overrides=["training.rounds=7"],
        quick=True,
    )
    assert plan.recipe.training.rounds == 7
    assert plan.recipe.sampling.prompts_per_round == 8
    assert plan.recipe.training.steps_per_round == 4
    assert not plan.recipe.evaluation.sampled


def test_quick_leaves_what_is_smaller(recipe: str):
    assert plan_of(recipe, quick=True).recipe.training.rounds == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [0]}, "a study needs 2 to 40 seeds, got 1"),
        ({"seeds": range(41)}, "a study needs 2 to 40 seeds, got 41"),
        ({"seeds": [1, 1]}, r"seeds \[1, 1\] name one twice"),
        ({"target_reward": float("nan")}, "--target-reward nan must be a finite reward"),
        ({"objectives": ["gmpo"]}, "must name at least two arms"),
        ({"objectives": ["gmpo", "gmpo"]}, "at least two arms, each once"),
        ({"objectives": ["grpo", "../x=gmpo"]}, "the label of letters"),
        ({"objectives": ["grpo", "gmp"]}, "objective.name = 'gmp'"),
        ({"overrides": ["training.steps_per_round=2"]}, "at least 4 optimizer steps a round"),
        ({"overrides": ["sampling.dynamic='refill'"]}, "rounds would not be pairs"),
        (
            {"overrides": ["guard.mode=mend", "guard.most_rollbacks=2"]},
            "back to before the trouble: crashes would not be counted, .* add --set "
            "guard.mode=warn --set guard.most_rollbacks=3$",
        ),
        (
            {"overrides": ["guard.skip_steps=true"]},
            "steps out: .* --set guard.skip_steps=false$",
        ),
        (
            {"overrides": ["guard.mode=mend", "guard.skip_steps=true"]},
            "trouble and guard.skip_steps = true leaves .* --set guard.mode=warn --set "
            "guard.skip_steps=false$",
        ),
        ({"overrides": ["training.seed=4"]}, "--seeds says which"),
        ({"overrides": ["objective.name='gspo'"]}, "--objectives says which"),
        ({"overrides": ["objective.clip_high=0.3"]}, "--set-for LABEL:objective.clip_high"),
        ({"arm_overrides": ["gspo:objective.clip_high=0.3"]}, r"LABEL one of \['grpo', 'gmpo'\]"),
        ({"arm_overrides": ["objective.clip_high=0.3"]}, "must be LABEL:table.key=value"),
        ({"arm_overrides": ["grpo:training.rounds=9"]}, "anything else would unpair them"),
        ({"arm_overrides": ["grpo:objective.name='gmpo'"]}, "anything else would unpair them"),
        ({"arm_overrides": ["grpo:objective.clip_hig=1"]}, "did you mean 'objective.clip_high'"),
    ],
)
def test_what_is_no_fair_comparison_is_refused(recipe: str, changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        plan_of(recipe, **changes)


@pytest.mark.parametrize("mode", ["off", "warn", "stop"])
def test_a_guard_that_changes_no_training_may_be_compared(recipe: str, mode: str):
    assert plan_of(recipe, overrides=[f"guard.mode={mode}"]).recipe.guard.mode == mode


def test_the_options_that_a_refused_guard_names_make_it_one_that_is_not(recipe: str):
    mends = ["guard.mode=mend", "guard.learning_rate_factor=0.1", "guard.skip_steps=true"]
    with pytest.raises(ConfigError) as refused:
        plan_of(recipe, overrides=mends)
    options = str(refused.value).split(" --set ")[1:]
    assert plan_of(recipe, overrides=[*mends, *options]).recipe.guard == GuardConfig()


def test_a_study_that_was_begun_with_such_a_guard_does_not_go_on(recipe: str, tmp_path: Path):
    study = tmp_path / "study"
    open_study(study, plan_of(recipe), warn=lambda _: None)
    record = json.loads((study / "study.json").read_text())
    for arm in record["arms"].values():
        arm["guard"]["mode"] = "mend"
    (study / "study.json").write_text(json.dumps(record))
    with pytest.raises(StudyError, match=r"guard\.mode = 'mend' .* and another --study folder"):
        open_study(study, None, warn=lambda _: None)


def test_seeds_are_whole_numbers():
    assert parse_seeds("0, 2,10") == (0, 2, 10)
    with pytest.raises(ConfigError, match="'0,x' must be whole numbers"):
        parse_seeds("0,x")
    with pytest.raises(ConfigError, match="from 0 on"):
        parse_seeds("-1,2")


def test_a_study_of_another_recipe_is_refused_with_the_keys_that_differ(
    recipe: str, tmp_path: Path
):
    study = tmp_path / "study"
    open_study(study, plan_of(recipe), warn=lambda _: None)
    asked = plan_of(
        recipe,
        seeds=[0, 2],
        overrides=["training.rounds=9", "description='another'"],
        arm_overrides=["grpo:objective.clip_high=0.3"],
    )
    with pytest.raises(StudyError) as refused:
        open_study(study, asked, warn=lambda _: None)
    sentences = re.search(r"another study; (.*)\. Choose", str(refused.value))
    assert sentences is not None
    assert sentences.group(1).split("; ") == [
        "seeds: [0, 1] there, [0, 2] here (more may be added behind those that are there, none "
        "left out)",
        "grpo: objective.clip_high: not set there, 0.3 here",
        "training.rounds: 2 there, 9 here",
    ]


def test_auto_is_settled_once_and_is_no_difference_later(recipe: str, tmp_path: Path):
    asked = plan_of(recipe)
    assert asked.recipe.model.dtype == "auto"
    opened = open_study(tmp_path / "study", asked, warn=lambda _: None)
    assert opened.recipe.model.dtype in ("fp32", "bf16")
    assert open_study(tmp_path / "study", asked, warn=lambda _: None) == opened
    other = "bf16" if opened.recipe.model.dtype == "fp32" else "fp32"
    named = plan_of(recipe, overrides=[f"model.dtype={other}"])
    assert [text.partition(":")[0] for text in plan_differences(opened, named)] == ["model.dtype"]


def test_the_kl_to_the_start_is_measured_on_the_last_round_unless_the_user_chose(
    recipe: str, tmp_path: Path
):
    def begun(name: str, *overrides: str) -> list[int]:
        asked = plan_of(recipe, overrides=["training.rounds=7", *overrides])
        opened = open_study(tmp_path / name, asked, warn=lambda _: None)
        assert open_study(tmp_path / name, asked, warn=lambda _: None) == opened
        return [cell.recipe.training.kl_ref_every for cell in opened.cells()]

    assert begun("not named") == [7] * 4
    assert begun("never", "training.kl_ref_every=0") == [0] * 4
    assert begun("often", "training.kl_ref_every=2") == [2] * 4
    # A folder that was begun without goes on without, unless something else is asked for.
    asked = plan_of(recipe, overrides=["training.rounds=7"])
    never = open_study(tmp_path / "never", asked, warn=lambda _: None)
    assert never.recipe.training.kl_ref_every == 0
    other = plan_of(recipe, overrides=["training.rounds=7", "training.kl_ref_every=3"])
    assert plan_differences(never, other) == ["training.kl_ref_every: 0 there, 3 here"]
    write_recipe(Path(recipe), tiny_recipe("no model", training__kl_ref_every=0))
    assert begun("never, says the file") == [0] * 4


def test_a_study_of_a_recipe_that_gmpo_wrote_is_that_of_the_original(recipe: str, tmp_path: Path):
    written = tmp_path / "run" / "recipe.toml"
    written.parent.mkdir()
    write_recipe(written, load_recipe(recipe))
    original, again = plan_of(recipe), plan_of(str(written))
    opened = open_study(tmp_path / "study", original, warn=lambda _: None)
    assert plan_differences(opened, again) == []
    anew = open_study(tmp_path / "anew", again, warn=lambda _: None)
    assert [arm.recipe for arm in anew.arms] == [arm.recipe for arm in opened.arms]
    assert {cell.recipe.training.kl_ref_every for cell in anew.cells()} == {2}


@pytest.mark.parametrize(
    ("file_name", "what"),
    [
        ("study.json", "a study of gmpo compare"),
        ("tuning.json", "a study of gmpo tune"),
        ("run.json", "a run of gmpo train"),
    ],
)
def test_a_new_study_does_not_begin_where_something_else_lies(
    file_name: str, what: str, recipe: str, tmp_path: Path
):
    folder = tmp_path / "taken"
    folder.mkdir()
    (folder / file_name).write_text("{}")
    told = f"taken holds {what}; choose another --study folder"
    if file_name != "study.json":
        with pytest.raises(StudyError, match=told):
            open_study(folder, plan_of(recipe), warn=lambda _: None)
    if file_name != "tuning.json":
        tuned = make_tuning_plan(recipe, TuningOptions(seeds=(5, 6)))
        with pytest.raises(StudyError, match=told):
            open_tuning(folder, tuned, trials=None, warn=lambda _: None)
    assert [path.name for path in folder.iterdir()] == [file_name]


def test_threads_are_the_folders_own(recipe: str, tmp_path: Path):
    opened = open_study(tmp_path / "study", plan_of(recipe, threads=1), warn=lambda _: None)
    again = open_study(tmp_path / "study", plan_of(recipe, threads=2), warn=lambda _: None)
    assert again.threads == opened.threads == 1


def test_a_folder_goes_on_with_its_own_plan(recipe: str, tmp_path: Path):
    opened = open_study(tmp_path / "study", plan_of(recipe), warn=lambda _: None)
    assert open_study(tmp_path / "study", None, warn=lambda _: None) == opened
    with pytest.raises(StudyError, match="holds no study to go on with"):
        open_study(tmp_path / "none", None, warn=lambda _: None)


def test_a_study_may_be_given_more_seeds(recipe: str, tmp_path: Path):
    study = tmp_path / "study"
    opened = open_study(study, plan_of(recipe, threads=1), warn=lambda _: None)
    begun = json.loads((study / "study.json").read_text())
    asked = plan_of(recipe, seeds=[0, 1, 5], threads=2)
    (study / "runs").mkdir()
    more = open_study(study, asked, warn=lambda _: None)
    assert more == replace(opened, seeds=(0, 1, 5), num_seeds_before=(2,))
    # All else stays as it was written, and the first cells are what they were.
    kept = json.loads((study / "study.json").read_text())
    assert kept == {**begun, "seeds": [0, 1, 5], "num_seeds_before": [2]}
    assert list(more.cells())[:4] == list(opened.cells())
    # A call that was killed here goes on with the new plan, however it is given again.
    assert open_study(study, None, warn=lambda _: None) == more
    assert open_study(study, asked, warn=lambda _: None) == more
    again = open_study(study, replace(more, seeds=(0, 1, 5, 6)), warn=lambda _: None)
    assert (again.seeds, again.num_seeds_before) == ((0, 1, 5, 6), (2, 3))


def test_seeds_that_are_added_before_anything_ran_were_not_chosen_by_results(
    recipe: str, tmp_path: Path
):
    study = tmp_path / "study"
    open_study(study, plan_of(recipe), warn=lambda _: None)
    more = open_study(study, plan_of(recipe, seeds=[0, 1, 2]), warn=lambda _: None)
    assert (more.seeds, more.num_seeds_before) == ((0, 1, 2), ())


@pytest.mark.parametrize("seeds", [[0, 1], [0, 1, 3], [1, 0, 2], [0, 2, 1, 3]])
def test_fewer_or_other_seeds_are_another_study(recipe: str, tmp_path: Path, seeds: list[int]):
    study = tmp_path / "study"
    open_study(study, plan_of(recipe, seeds=[0, 1, 2]), warn=lambda _: None)
    before = (study / "study.json").read_bytes()
    with pytest.raises(StudyError, match=r"seeds: \[0, 1, 2\] there, .* none left out"):
        open_study(study, plan_of(recipe, seeds=seeds), warn=lambda _: None)
    changed = plan_of(recipe, seeds=[0, 1, 2, 3], overrides=["training.rounds=9"])
    with pytest.raises(StudyError, match=r"another study; training.rounds: 2 there, 9 here\."):
        open_study(study, changed, warn=lambda _: None)
    assert (study / "study.json").read_bytes() == before


def test_a_study_that_a_process_runs_is_given_no_seeds(recipe: str, tmp_path: Path):
    study = tmp_path / "study"
    open_study(study, plan_of(recipe), warn=lambda _: None)
    before = (study / "study.json").read_bytes()
    with (study / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunFolderError, match="is being run by another process"):
            open_study(study, plan_of(recipe, seeds=[0, 1, 2]), warn=lambda _: None)
    assert (study / "study.json").read_bytes() == before


def test_of_two_calls_that_add_seeds_at_once_the_second_is_judged_by_what_the_first_left(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    study = tmp_path / "study"
    first = open_study(study, plan_of(recipe), warn=lambda _: None)
    open_study(study, plan_of(recipe, seeds=[0, 1, 2]), warn=lambda _: None)
    lock = study / ".lock"

    def read_before_the_other_wrote(folder: Path) -> StudyPlan | None:
        return load_plan(folder) if lock.exists() else first

    lock.unlink()  # which is made where it is locked
    monkeypatch.setattr("gmpo.study.cells.load_plan", read_before_the_other_wrote)
    with pytest.raises(StudyError, match=r"seeds: \[0, 1, 2\] there, \[0, 1, 3\] here"):
        open_study(study, plan_of(recipe, seeds=[0, 1, 3]), warn=lambda _: None)
    lock.unlink()
    same = open_study(study, plan_of(recipe, seeds=[0, 1, 2]), warn=lambda _: None)
    assert (same.seeds, same.num_seeds_before) == ((0, 1, 2), ())


def test_a_plan_that_another_call_changed_is_not_run(recipe: str, tmp_path: Path):
    study = tmp_path / "study"
    stale = open_study(study, plan_of(recipe), warn=lambda _: None)
    open_study(study, plan_of(recipe, seeds=[0, 1, 2]), warn=lambda _: None)
    with pytest.raises(StudyError, match="another call changed the plan of study"):
        run_study(study, stale)
    assert not (study / "runs").exists()


def test_a_study_from_before_seeds_could_be_added_has_none_that_were(recipe: str):
    plan = plan_of(recipe)
    table = plan.as_dict()
    del table["num_seeds_before"]
    assert StudyPlan.from_dict(table, source="here") == plan


def test_a_damaged_or_lost_plan_is_named(recipe: str, tmp_path: Path):
    study = tmp_path / "study"
    open_study(study, plan_of(recipe), warn=lambda _: None)
    text = (study / "study.json").read_text()
    (study / "study.json").write_text(text[:100])
    with pytest.raises(RunFolderError, match=r"study\.json cannot be read"):
        load_plan(study)
    (study / "study.json").unlink()
    (study / "runs").mkdir()
    with pytest.raises(StudyError, match=r"holds runs but no study\.json"):
        open_study(study, plan_of(recipe), warn=lambda _: None)


def test_a_plan_of_other_labels_is_another_study(recipe: str):
    there = plan_of(recipe)
    asked = replace(there, arms=there.arms[::-1])
    assert plan_differences(there, asked) == [
        "objectives: ['grpo', 'gmpo'] there, ['gmpo', 'grpo'] here"
    ]
