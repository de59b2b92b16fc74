"""Models on suites through the command line, with tiny random models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.commands import gmpo, jsonl, refusal
from tests.models import save_tiny
from tests.suite_outcomes import greedy

from gmpo.outcomes import Mix, stored_outcomes, write_outcomes
from gmpo.tracking import provenance

ROWS = [{"id": f"q{n}", "problem": f"{n}+1", "answer": str(n + 1)} for n in range(6)]
ASKED = ("--max-tokens", "4", "--instruction", "", "--set", "model.dtype=fp32")


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("arms")
    one, two = (f"{n}={save_tiny(folder / n, seed=s)}" for s, n in enumerate(("GRPO", "GMPO")))
    return one, two


@pytest.fixture
def data(tmp_path: Path) -> Path:
    jsonl(tmp_path / "amc.jsonl", ROWS)
    jsonl(tmp_path / "aime24.jsonl", ROWS[:3])
    return tmp_path


def test_stored_outcomes_give_the_table_of_the_run(arms: tuple[str, str], data: Path):
    out = data / "out"
    suites = ("--suite", "aime24", "--suite", "amc", "--data", data)
    asked = gmpo("evaluate", *arms, *suites, *ASKED, "--samples", "4", "--k", "2", "--out", out)
    assert asked.exit_code == 0, asked.stderr
    assert "GMPO - GRPO" in asked.stdout
    written = json.loads((out / "results.json").read_text())
    assert [table["metric"]["name"] for table in written["tables"]] == [
        "greedy pass@1",
        "mean@4",
        "pass@2",
    ]
    assert [count["completions"] for count in written["counts"]] == [3, 12, 6, 24] * 2
    assert written["made_with"] == [provenance()]
    assert written["counts"][0]["asked_with"] == {
        "prompt_format": "chat",
        "system": None,
        "rollout": None,
        "stop_strings": [],
        "dtype": "fp32",
        "mix": None,
    }
    again = gmpo("evaluate", out, "--k", "2", "--json")
    assert json.loads(again.stdout) == written
    assert (out / "results.png").stat().st_size > 1000


def texts(folder: Path) -> dict[str, list[list[str | None]]]:
    """Of each way's items, as stored."""
    return {
        one.way.name: [[each.text for each in item.completions] for item in one.items]
        for one in stored_outcomes(folder)
    }


def test_a_mixture_is_asked_like_a_model_and_named_in_tables_and_files(
    arms: tuple[str, str], data: Path
):
    first, second = (arm.partition("=")[2] for arm in arms)
    plain = ("--suite", "amc", "--data", data, *ASKED, "--keep-texts")
    for label, model, weight in (
        *(("one", first, None), ("two", second, None)),
        *(("all-one", first, 0), ("all-two", first, 1), ("half", first, 0.5)),
    ):
        mix = () if weight is None else ("--mix", f"{second}={weight}")
        out = ("--out", data / label)
        done = gmpo("evaluate", f"{label}={model}", *plain, *mix, *out)
        assert done.exit_code == 0, done.stderr
    assert texts(data / "all-one") == texts(data / "one")
    assert texts(data / "all-two") == texts(data / "two")
    asked_with = stored_outcomes(data / "half")[0].asked_with
    assert asked_with is not None
    assert asked_with.mix == Mix(name=second, weight=0.5)
    shown = gmpo("evaluate", data / "one", data / "half")
    assert "half - one" in shown.stdout
    assert "0.5 mixed in" in shown.stdout
    assert f"mixture with none for one and 0.5 of {second} for half" in shown.stderr
    named = gmpo("evaluate", first, *plain, "--mix", f"{second}=0.5", "--json")
    assert json.loads(named.stdout)["counts"][0]["label"] == "GRPO + 0.5 GMPO"


def test_the_best_of_n_is_one_of_the_n_samples(arms: tuple[str, str], data: Path):
    plain = ("--suite", "amc", "--data", data, *ASKED, "--keep-texts", "--no-greedy")
    for name, options in (("drawn", ("--samples", "4")), ("best", ("--best-of", "4"))):
        done = gmpo("evaluate", arms[0], *plain, *options, "--out", data / name)
        assert done.exit_code == 0, done.stderr
    drawn, best = texts(data / "drawn")["sampled"], texts(data / "best")["sampled"]
    assert all(text in four for (text,), four in zip(best, drawn, strict=True))
    assert [[text] for text, *_ in drawn] != best
    shown = gmpo("evaluate", data / "best", "--json")
    (table,), (counts,) = (json.loads(shown.stdout)[key] for key in ("tables", "counts"))
    assert table["metric"]["name"] == "mean@1, each the best of 4"
    assert (counts["num_samples"], counts["best_of"], counts["completions"]) == (1, 4, 6)


def test_models_of_like_labels_have_a_folder_each(data: Path):
    labels = ("a b", "a-b", "A-B", "..")
    stored = []
    for place, label in enumerate(labels):
        stored.append(data / f"stored-{place}")
        write_outcomes(stored[-1], greedy(label, {0}, 2), place=0)
    out = data / "out"
    done = gmpo("evaluate", *stored, "--out", out)
    assert done.exit_code == 0, done.stderr
    found = {path.parent.name: stored_outcomes(path.parent)[0].label for path in out.glob("*/*")}
    assert found == {"a-b-3": "a b", "a-b": "a-b", "A-B-2": "A-B", "--": ".."}
    assert [one.label for one in stored_outcomes(out)] == list(labels)
    assert not list(data.glob("*.outcomes.json"))


def test_models_without_a_shared_item_are_refused(arms: tuple[str, str], data: Path):
    for label, rows in (("a", ROWS[:3]), ("b", ROWS[3:])):
        jsonl(data / "amc.jsonl", rows)
        out = ("--out", data / label)
        done = gmpo(
            "evaluate", f"{label}={arms[0][5:]}", "--suite", "amc", "--data", data, *ASKED, *out
        )
        assert done.exit_code == 0, done.stderr
    assert "'a' and 'b' share no item of amc" in refusal("evaluate", data / "a", data / "b")


def test_models_that_recipes_put_the_items_to_differently_are_refused(
    arms: tuple[str, str], data: Path
):
    suite = ("--suite", "amc", "--data", data, *ASKED)
    for arm, system in zip(arms, ("", "Sum."), strict=True):
        out = ("--out", data / arm[:4])
        done = gmpo("evaluate", arm, *suite, "--set", f"model.system={system!r}", *out)
        assert done.exit_code == 0, done.stderr
    said = refusal("evaluate", data / "GRPO", data / "GMPO")
    assert "amc was put differently to 'GRPO' and 'GMPO': the system turn was '' and 'Sum.'" in said


def test_recipes_that_put_the_items_differently_are_refused_before_a_model_is_asked(
    arms: tuple[str, str], data: Path
):
    plain, trained = (Path(arm[5:]) for arm in arms)
    run = data / "run"
    checkpoint = run / "checkpoints" / "round-000001"
    shutil.copytree(trained, checkpoint / "model")
    (checkpoint / "state.json").write_text("{}")
    (run / "recipe.toml").write_text('model.system = "Sum."\n[task]\nkind = "gsm8k"\n')
    asked = ("--suite", "amc", "--data", data, *ASKED, "--out", data / "out")
    said = refusal("evaluate", f"a={plain}", f"b={run}", *asked)
    assert "model.system is None for 'a', 'Sum.' for 'b'; ask all alike" in said
    assert not (data / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--suite", "aime"), "did you mean 'aime24'?"),
        (("--suite", "minerva"), "download math-ai/minervamath"),
        (("--suite", "amc", "--samples", "2", "--k", "3"), "k = 3 is not from 1 to the 2 samples"),
        (("--suite", "amc", "--k", "3"), "give --samples 3"),
        (("--suite", "gsm8k", "--suite", "svamp"), "--data would do nothing for gsm8k and svamp"),
        (("--suite", "amc", "--temperature", "0.5"), "give --samples too"),
        (("--suite", "amc", "--samples", "2", "--temperature", "inf"), "need a finite one above 0"),
        (("--suite", "amc", "--items", "9"), "9 items were asked for, and suite amc has 6"),
        (("--suite", "amc", "--max-tokens", "300"), "give --max-tokens below that"),
        (("--suite", "amc", "--best-of", "0"), "--best-of is 0; it must be at least 1"),
        (("--suite", "amc", "--mix", "other"), "write OTHER=WEIGHT"),
        (("--suite", "amc", "--mix", "other=1.5"), "the weight from 0 to 1"),
        (("--suite", "amc", "--mix", "no-such-model=0.5"), "no-such-model"),
        (("--suite", "amc", "--set", "training.rounds=3"), "has no effect on suites"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    options: tuple[str, ...], said: str, arms: tuple[str, str], data: Path
):
    assert said in refusal("evaluate", arms[0], "--data", data, *options)


def test_an_item_longer_than_the_context_is_named_with_what_helps(
    arms: tuple[str, str], data: Path
):
    for tokens, remedy in ((250, "give --max-tokens"), (300, "a model with a longer context")):
        jsonl(data / "amc.jsonl", [{"id": "long", "problem": "1" * tokens, "answer": "1"}])
        said = refusal("evaluate", arms[0], "--suite", "amc", "--data", data, *ASKED)
        assert "item 'long' of suite amc has" in said
        assert remedy in said


def test_a_folder_does_not_replace_bundled_suites_and_says_so(data: Path):
    path = jsonl(data / "train.jsonl", [{"prompt": "x", "answer": "1"}])
    suites = ("--suite", "amc", "--suite", "svamp")
    done = gmpo("contamination", path, *suites, "--data", data, "--json")
    assert done.exit_code == 0, done.stderr
    assert "--data does not replace what comes with the package: svamp" in done.stderr
    refused = refusal("contamination", path, "--suite", "svamp", "--data", data)
    assert "--data would do nothing for svamp" in refused


def test_planted_items_are_found_in_training_data(data: Path):
    problem = "Seven green turtles walk along the long river and meet nine blue turtles how many"
    jsonl(data / "amc.jsonl", [{"id": "planted", "problem": problem, "answer": "16"}, *ROWS[:1]])
    train = [
        {"prompt": f"Before. {problem}? After.", "answer": "16"},
        {"prompt": "x", "answer": "1"},
    ]
    path = jsonl(data / "train.jsonl", train)
    done = gmpo("contamination", path, "--suite", "amc", "--data", data, "--json")
    found = json.loads(done.stdout)
    assert found["made_with"] == provenance()
    (suite,) = found["suites"]
    (match,) = suite["matches"]
    assert (match["item_id"], match["whole"], match["coverage"]) == ("planted", True, 1.0)
    assert match["training_id"].endswith("train.jsonl:1")


def test_what_all_items_begin_with_is_left_out_and_said_so(data: Path):
    asked = "Solve the problem below step by step and put the answer alone on the last line"
    items = [
        {"id": f"q{n}", "problem": f"{asked}: {n} plus {n}", "answer": str(2 * n)}
        for n in range(12)
    ]
    jsonl(data / "amc.jsonl", items)
    path = jsonl(data / "train.jsonl", [{"prompt": f"{asked}: 70 plus 4", "answer": "74"}])
    done = gmpo("contamination", path, "--suite", "amc", "--data", data)
    assert done.exit_code == 0, done.stderr
    assert "not looked for: 4 runs of words that more than a fifth of AMC's items" in done.stdout
    assert "train.jsonl:1" not in done.stdout
