"""A federation's plan: clients' recipes, refusals, and what two of them have otherwise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_runs import tiny_recipe, write_recipe

from gmpo.errors import ConfigError, DataError, FederationError, RunFolderError
from gmpo.federated import FederatedPlan, Federation, load_federated_plan, resolve_federation
from gmpo.federated.clients import client_recipe, refuse_leaks, training_rows
from gmpo.federated.folder import FederationFolder
from gmpo.federated.judging import server_suites
from gmpo.recipe import recipe_of_table, settings_of

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "federated"


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    return write_recipe(tmp_path / "tiny.toml", tiny_recipe("no such model"))


def plan_of(recipe: str, clients: dict[str, Any], **changes: Any) -> FederatedPlan:
    table = {"recipe": recipe, "clients": clients, **changes}
    return settings_of(FederatedPlan, table, of="plan")


def rows_file(path: Path, first: int, count: int) -> str:
    rows = [f'{{"prompt": "{n}+{n}=", "answer": "{2 * n}"}}' for n in range(first, first + count)]
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def federation(recipe: str, tmp_path: Path, **changes: Any) -> Federation:
    own = {
        name: {"task": {"kind": "jsonl", "path": rows_file(tmp_path / name, first, 20)}}
        for name, first in (("north", 0), ("south", 20))
    }
    items = rows_file(tmp_path / "items.jsonl", 100, 30)
    judging = {"suites": {"own": items}, **changes.pop("judging", {})}
    return resolve_federation(plan_of(recipe, own, judging=judging, **changes))


def test_a_client_has_the_recipe_but_for_its_own_keys(recipe: str, tmp_path: Path):
    own = {
        "north": {"task": {"max_operand": 3}, "training": {"rounds": 5}},
        "south": {"task": {"kind": "jsonl", "path": "rows.jsonl"}},
    }
    found = resolve_federation(plan_of(recipe, own, overrides=["sampling.group_size=4"]))
    north, south = found.clients["north"], found.clients["south"]
    assert (north.task.kind, north.task.max_operand, north.task.held_out_items) == (
        "arithmetic",
        3,
        5,
    )
    assert (north.training.rounds, south.training.rounds) == (5, 2)
    # A task with a kind stands in place of the recipe's: nothing of arithmetic is left in it.
    assert (south.task.kind, south.task.held_out_items) == ("jsonl", None)
    # From any folder, as the federation may go on from another.
    assert south.task.path == str(Path("rows.jsonl").absolute())
    assert north.sampling.group_size == south.sampling.group_size == 4


def test_every_round_and_client_draws_with_a_seed_of_its_own(recipe: str, tmp_path: Path):
    found = federation(recipe, tmp_path)
    seeds = {
        client_recipe(found, name, number=number, base=tmp_path).training.seed
        for name in found.clients
        for number in (1, 2)
    }
    assert len(seeds) == 4
    again = client_recipe(found, "north", number=1, base=tmp_path)
    assert again == client_recipe(found, "north", number=1, base=tmp_path)
    assert again.model.name == str(tmp_path)
    assert again.evaluation.items == 1


def test_a_run_that_mends_keeps_what_it_goes_back_to(recipe: str, tmp_path: Path):
    changes = ["guard.mode=mend", "evaluation.skip_items=2", "checkpoint.every_rounds=1"]
    found = federation(recipe, tmp_path, overrides=changes)
    told = client_recipe(found, "north", number=1, base=tmp_path)
    assert told.checkpoint.keep == 2
    # As the run's own process reads it.
    assert recipe_of_table(told.model_dump(mode="json", exclude_none=True), source="x") == told


def test_all_rows_of_a_client_but_one_are_trained_on(recipe: str, tmp_path: Path):
    assert len(training_rows(federation(recipe, tmp_path), "north")) == 19


@pytest.mark.parametrize(
    ("clients", "changes", "said"),
    [
        ({"one": {}}, {}, "clients"),
        ({"one": {}, "a/b": {}}, {}, "'a/b' must begin with a letter or digit"),
        ({"a": {}, "b": {}}, {"aggregation": {"min_clients": 3}}, "there are 2 clients"),
        ({"a": {}, "b": {}}, {"round": 3}, "rounds"),
        ({"a": {}, "b": {}}, {"judging": {"suites": {"overall": "x"}}}, "not be 'overall'"),
        ({"a": {}, "b": {"trainin": {"rounds": 1}}}, {}, "client b of the plan"),
        ({"a": {}, "b": {"model": {"dtype": "bf16"}}}, {}, r"client b changes \[model\]"),
        ({"a": {}, "b": {"task": 3}}, {}, "client b"),
        ({"a": {}, "A": {}}, {}, "clients a, A differ in case alone"),
        (
            {"a": {}, "b": {}},
            {"overrides": ["evaluation.measure=reward"]},
            "judges by graded answers",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused(
    clients: dict[str, Any], changes: dict[str, Any], said: str, recipe: str
):
    with pytest.raises(ConfigError, match=said):
        resolve_federation(plan_of(recipe, clients, **changes))


def test_a_plan_is_read_from_toml_with_overrides(recipe: str, tmp_path: Path):
    path = tmp_path / "plan.toml"
    path.write_text(f'recipe = "{recipe}"\n[clients.a]\n[clients.b.task]\nmax_operand = 3\n')
    found = load_federated_plan(path, ["rounds=2", "aggregation.rule=geometric_median"])
    assert (found.rounds, found.aggregation.rule) == (2, "geometric_median")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_federated_plan(tmp_path / "none.toml")
    path.write_text("rounds = [")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_federated_plan(path)


def test_what_another_federation_has_otherwise_is_named(recipe: str, tmp_path: Path):
    one = federation(recipe, tmp_path)
    assert one.differences(one) == []
    assert Federation.from_dict(one.as_dict(), source="x").differences(one) == []
    assert one.differences(federation(recipe, tmp_path, gap_items=0)) == []
    other = federation(recipe, tmp_path, rounds=7, overrides=["training.rounds=3"])
    assert one.differences(other) == [
        "client north: training.rounds is 3, and was 2",
        "client south: training.rounds is 3, and was 2",
        "plan: rounds is 7, and was 4",
        "recipe: training.rounds is 3, and was 2",
    ]


def test_the_server_asks_its_files_or_what_the_recipe_holds_out(recipe: str, tmp_path: Path):
    found = server_suites(federation(recipe, tmp_path))
    assert {name: len(items) for name, items in found.items()} == {"own": 30}
    fewer = server_suites(federation(recipe, tmp_path, judging={"items": 11}))
    assert len(fewer["own"]) == 11
    assert fewer == server_suites(federation(recipe, tmp_path, judging={"items": 11}))
    more = ["task.held_out_items=12"]
    held = server_suites(resolve_federation(plan_of(recipe, {"a": {}, "b": {}}, overrides=more)))
    assert {name: len(items) for name, items in held.items()} == {"held_out": 12}
    few = rows_file(tmp_path / "few.jsonl", 300, 9)
    with pytest.raises(DataError, match=r"suite own has 9 items, and 10 are needed: .* any model"):
        server_suites(federation(recipe, tmp_path, judging={"suites": {"own": few}}))
    with pytest.raises(DataError, match=r"suite own has 30 items, and 100 are needed: .* for ever"):
        server_suites(federation(recipe, tmp_path, judging={"in_doubt": "keep"}))
    twice = {"own": str(tmp_path / "items.jsonl"), "other": str(tmp_path / "items.jsonl")}
    with pytest.raises(ConfigError, match="each counts once"):
        server_suites(federation(recipe, tmp_path, judging={"suites": twice}))


def test_a_client_that_trains_on_what_the_server_asks_is_refused(recipe: str, tmp_path: Path):
    refuse_leaks(
        found := federation(recipe, tmp_path),
        server_suites(found),
    )
    leaking = rows_file(tmp_path / "leaking.jsonl", 38, 10)
    found = federation(recipe, tmp_path, judging={"suites": {"own": leaking}})
    with pytest.raises(DataError, match=r"training rows of client south are items .* of own"):
        refuse_leaks(found, server_suites(found))
    # The sentence after a question makes no other question of it.
    sentence = {"task": {"instruction": "Just the number."}}
    own = {
        name: {**task, "task": task["task"] | sentence["task"]}
        for name, task in found.plan.clients.items()
    }
    told = resolve_federation(found.plan.model_copy(update={"clients": own}))
    with pytest.raises(DataError, match="training rows of client south"):
        refuse_leaks(told, server_suites(told))
    (tmp_path / "north").unlink()
    with pytest.raises(DataError, match=r"client north: .*north"):
        refuse_leaks(found, server_suites(found))


def test_a_folder_that_is_something_else_or_damaged_is_refused(recipe: str, tmp_path: Path):
    found = federation(recipe, tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(FederationError, match="is not empty"):
        FederationFolder(path=tmp_path / "used").begin(found)
    folder = FederationFolder(path=tmp_path / "new")
    assert folder.federation() is None
    folder.begin(found)
    assert folder.federation() == found
    assert folder.reports() == []
    with folder.locked(), pytest.raises(FederationError, match="another process"), folder.locked():
        pass
    for text, said in (("{", "cannot be read"), ("[]", "is no table"), ("{}", "KeyError")):
        (tmp_path / "new" / "federation.json").write_text(text)
        with pytest.raises(RunFolderError, match=said):
            folder.federation()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / ".federation.json.partial").write_text("{")
    FederationFolder(path=tmp_path / "half").begin(found)
    with pytest.raises(RunFolderError, match=r"notes\.txt cannot be written"):
        FederationFolder(path=tmp_path / "used" / "notes.txt").begin(found)


def test_the_example_of_the_page_is_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    make = [sys.executable, EXAMPLE / "make_clients.py", "runs/federated-data"]
    subprocess.run(make, check=True, capture_output=True)
    found = resolve_federation(load_federated_plan(EXAMPLE / "sums.toml"))
    suites = server_suites(found)
    refuse_leaks(found, suites)
    assert {name: len(items) for name, items in suites.items()} == {"sums": 300}
    rows = {name: {row.id for row in training_rows(found, name)} for name in found.clients}
    assert sum(map(len, rows.values())) == len(set.union(*rows.values())) > 1900
    asked = {frozenset(item.id.split("+")) for items in suites.values() for item in items}
    assert not any(frozenset(row.split("+")) in asked for of in rows.values() for row in of)
