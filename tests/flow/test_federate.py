"""Federations of a tiny model: rounds, stops, poisoned clients, and updates made apart."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.commands import gmpo, refusal
from tests.federated_updates import update_of
from tests.federations import federation, plan_file, run, same_models, write_items
from tests.models import save_tiny
from tests.tiny_runs import write_recipe

from gmpo.continual.plan import write_rows
from gmpo.errors import DataError, FederationError, RunStopped
from gmpo.export import copy_model
from gmpo.federated import (
    Federation,
    open_federation,
)
from gmpo.federated.folder import FederationFolder
from gmpo.federated.records import ClientRow
from gmpo.model_files import model_tensors, weights_version

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def items(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_items(tmp_path_factory.mktemp("items"), model)


@pytest.fixture(scope="module")
def finished(model: str, items: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("federations")
    run(place / "whole", federation(place, model, items))
    return place / "whole"


def test_rounds_move_the_model_and_tell_what_each_client_did(finished: Path, model: str):
    reports = FederationFolder(path=finished).reports()
    assert [report.number for report in reports] == [1, 2]
    assert [report.outcome for report in reports] == ["accepted"] * 2
    assert reports[0].base == weights_version(Path(model))
    assert reports[1].base == reports[0].model
    assert reports[1].model == weights_version(finished / reports[1].folder)
    for report in reports:
        assert [row.client for row in report.clients] == ["north", "south", "east"]
        # 2 local rounds of 8 prompts and 8 completions
        assert [row.sequences for row in report.clients] == [128] * 3
        (attempt,) = report.attempts
        shares = attempt.aggregation["shares"]
        assert [share["weight"] for share in shares] == pytest.approx([1 / 3] * 3)
        assert all(share["norm"] > 0 for share in shares)
        assert report.gap is not None
        assert 0 <= report.gap.gap < report.gap.spread
    # Beside the reports only models stay: no client's weights and no updates.
    kept = {path.parent.name for path in finished.rglob("*.safetensors")}
    assert kept == {"000", "001", "002"}


def test_a_federation_that_was_stopped_goes_on_to_the_same_weights(
    finished: Path, model: str, items: Path, tmp_path: Path
):
    asked = federation(tmp_path, model, items)
    place = tmp_path / "stopped"
    first = place / "rounds" / "001" / "clients"
    for mark in ("south/run/metrics.jsonl", "east/run/run.json"):
        with pytest.raises(RunStopped):
            run(place, asked, should_stop=(first / mark).is_file)
    reports = run(place, None)
    assert [report.number for report in reports] == [1, 2]
    for number in ("001", "002"):
        assert same_models(finished / "models" / number, place / "models" / number)
    told: list[str] = []
    assert run(place, asked, say=told.append) == reports
    assert told == []


def test_a_round_whose_process_died_before_its_report_is_done_again(
    finished: Path, model: str, items: Path, tmp_path: Path
):
    place = tmp_path / "again"
    shutil.copytree(finished, place)
    (place / "rounds" / "002" / "report.json").unlink()
    shutil.rmtree(place / "rounds" / "002" / "clients")
    reports = run(place, None)
    assert len(reports) == 2
    assert same_models(finished / "models" / "002", place / "models" / "002")


def test_another_plan_or_none_is_refused(finished: Path, model: str, items: Path, tmp_path: Path):
    with pytest.raises(FederationError, match="rounds is 3, and was 2"):
        open_federation(finished, federation(tmp_path, model, items, rounds=3))
    # What is only measured may be measured less.
    same = federation(finished.parent, model, items, gap_items=0)
    _, less = open_federation(finished, same)
    assert less.plan.gap_items == 0
    with pytest.raises(FederationError, match="name a plan"):
        open_federation(tmp_path / "none", None)
    rows = jsonl_rows(items)
    write_rows(tmp_path / "leak.jsonl", [*rows[:3], {"prompt": "1+1=", "answer": "2"}])
    leak = {"kind": "jsonl", "path": str(tmp_path / "leak.jsonl"), "instruction": ""}
    asked = federation(
        tmp_path,
        model,
        items,
        own={"north": {"task": leak}},
        judging={"suites": {"own": str(items)}},
    )
    with pytest.raises(DataError, match="training rows of client north"):
        open_federation(tmp_path / "leaks", asked)
    assert not (tmp_path / "leaks").exists()


def jsonl_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_client_that_diverges_sends_nothing(model: str, items: Path, tmp_path: Path):
    wild = {"training": {"learning_rate": 1e30}}
    asked = federation(tmp_path, model, items, own={"south": wild}, rounds=1)
    (report,) = run(tmp_path / "run", asked)
    assert report.outcome == "accepted"
    assert [row.outcome for row in report.clients] == ["trained", "diverged", "trained"]
    assert report.clients[1].message
    shares = report.attempts[0].aggregation["shares"]
    assert [share["client"] for share in shares] == ["north", "east"]
    (tmp_path / "all").mkdir()
    asked = federation(
        tmp_path / "all", model, items, recipe={"training__learning_rate": 1e30}, rounds=1
    )
    (report,) = run(tmp_path / "all" / "run", asked)
    assert report.outcome == "kept"
    assert report.model == report.base == weights_version(Path(model))
    assert "none of 3 clients sent an update" in report.sentence


def test_the_clients_own_accuracy_can_weigh(model: str, items: Path, tmp_path: Path):
    exponents = {"score_exponents": {"accuracy": 2.0}}
    far = {"south": {"training": {"learning_rate": 3e-3}}}
    settings = {**exponents, "largest_norm": 1e9}
    asked = federation(tmp_path, model, items, rounds=1, own=far, aggregation=settings)
    (report,) = run(tmp_path / "run", asked)
    squares = np.array([row.accuracy for row in report.clients]) ** 2
    assert squares[1] < squares[0], "all weigh alike: nothing would be shown"
    shares = report.attempts[0].aggregation["shares"]
    assert [share["weight"] for share in shares] == pytest.approx(squares / squares.sum())


def prepared(place: Path, asked: Federation, rows: dict[str, dict[str, np.ndarray]]) -> Path:
    """A federation whose clients have trained already, and sent these."""
    folder, found = open_federation(place, asked)
    copy_model(found.recipe.model.name, folder.model(0))
    version = weights_version(folder.model(0))
    for name, values in rows.items():
        file = folder.update(1, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        update_of(file.parent, name, values, base=version, sequences=100)
        row = ClientRow(
            client=name,
            outcome="trained",
            message="",
            sequences=100,
            reward_start=0.5,
            reward_end=0.5,
            accuracy=None,
            seconds=1.0,
        )
        folder.write(folder.client(1, name) / "trained.json", asdict(row))
    return folder.model(0)


def sent(model: str, *, poisoned: int, clients: int) -> dict[str, dict[str, np.ndarray]]:
    """Small honest updates, and some that put the output layer to noise."""
    generator = np.random.default_rng(0)
    shapes = {name: tensor.shape for name, tensor in model_tensors(Path(model)).items()}
    found = {}
    for place in range(clients):
        scale = 3.0 if place < poisoned else 1e-4
        found[f"c{place}"] = {
            name: scale * generator.normal(size=shape) for name, shape in shapes.items()
        }
    return found


def test_where_the_mean_is_worse_the_geometric_median_is_taken(
    model: str, items: Path, tmp_path: Path
):
    names = tuple(f"c{place}" for place in range(5))
    asked = federation(
        tmp_path, model, items, names=names, rounds=1, aggregation={"largest_norm": 1e9}
    )
    prepared(tmp_path / "run", asked, sent(model, poisoned=2, clients=5))
    (report,) = run(tmp_path / "run", None)
    assert report.outcome == "fell_back"
    mean, median = report.attempts
    assert not mean.is_accepted
    assert mean.decision is not None
    assert mean.decision["outcome"] == "fail"
    assert median.is_accepted
    assert report.accuracy["own"] > 0.9
    assert "geometric median of 5 clients, as the mean was not accepted" in report.sentence


def test_a_length_beyond_the_others_is_left_out_before_anything_is_made(
    model: str, items: Path, tmp_path: Path
):
    names = tuple(f"c{place}" for place in range(5))
    asked = federation(tmp_path, model, items, names=names, rounds=1)
    prepared(tmp_path / "run", asked, sent(model, poisoned=2, clients=5))
    (report,) = run(tmp_path / "run", None)
    assert report.outcome == "accepted"
    assert len(report.attempts) == 1
    shares = report.attempts[0].aggregation["shares"]
    assert ["times the median" in share["left_out"] for share in shares] == [True] * 2 + [False] * 3


def test_where_both_are_worse_the_model_stays(model: str, items: Path, tmp_path: Path):
    asked = federation(tmp_path, model, items, rounds=1, aggregation={"largest_norm": 1e9})
    rows = sent(model, poisoned=3, clients=3)
    start = prepared(tmp_path / "run", asked, dict(zip(asked.clients, rows.values(), strict=True)))
    (report,) = run(tmp_path / "run", None)
    assert report.outcome == "kept"
    assert len(report.attempts) == 2
    assert report.model == weights_version(start)
    assert report.folder == "models/000"
    assert not (tmp_path / "run" / "models" / "001").exists()


def test_a_model_that_cannot_be_asked_is_not_taken(model: str, items: Path, tmp_path: Path):
    # A greedy answer is the first token of those that are not finite; none can be drawn.
    judging = {"suites": {"own": str(items)}, "items": 60, "samples": 2}
    asked = federation(tmp_path, model, items, rounds=1, judging=judging)
    shapes = {name: tensor.shape for name, tensor in model_tensors(Path(model)).items()}
    # Of the last norm, so that logits are beyond fp32.
    huge = {
        name: np.full(shape, 3e38 * (name == "model.norm.weight")) for name, shape in shapes.items()
    }
    rows = dict.fromkeys(asked.clients, huge)
    start = prepared(tmp_path / "run", asked, rows)
    (report,) = run(tmp_path / "run", None)
    assert report.outcome == "kept"
    assert report.model == weights_version(start)
    assert "cannot be asked" in report.sentence


def test_updates_of_nothing_leave_the_model(model: str, items: Path, tmp_path: Path):
    asked = federation(tmp_path, model, items, rounds=1)
    shapes = {name: tensor.shape for name, tensor in model_tensors(Path(model)).items()}
    nothing = {name: np.zeros(shape) for name, shape in shapes.items()}
    prepared(tmp_path / "run", asked, dict.fromkeys(asked.clients, nothing))
    (report,) = run(tmp_path / "run", None)
    assert (report.outcome, len(report.attempts)) == ("kept", 1)
    assert "no weight changed" in report.sentence
    assert not (tmp_path / "run" / "models" / "001").exists()


def test_in_doubt_a_model_may_be_kept(model: str, items: Path, tmp_path: Path):
    judging = {"suites": {"own": str(items)}, "items": 100, "degradation_limit": 0.001}
    for in_doubt, outcome in (("accept", "accepted"), ("keep", "kept")):
        (tmp_path / in_doubt).mkdir()
        asked = federation(
            tmp_path / in_doubt, model, items, rounds=1, judging={**judging, "in_doubt": in_doubt}
        )
        rows = sent(model, poisoned=0, clients=3)
        prepared(
            tmp_path / in_doubt / "run",
            asked,
            dict(zip(asked.clients, rows.values(), strict=True)),
        )
        (report,) = run(tmp_path / in_doubt / "run", None)
        assert report.outcome == outcome
        assert report.attempts[0].decision is not None
        assert report.attempts[0].decision["outcome"] == "inconclusive"


def test_each_round_is_held_against_the_first_model_too(finished: Path):
    first, second = FederationFolder(path=finished).reports()
    assert first.attempts[0].decision is not None
    assert first.attempts[0].decision["anchor"] is None
    assert second.attempts[0].decision is not None
    anchor = second.attempts[0].decision["anchor"]
    assert set(anchor["versions"].values()) == {first.base}


def test_a_client_may_train_adapters(model: str, items: Path, tmp_path: Path):
    own = {"south": {"lora": {"rank": 2}, "training": {"learning_rate": 1e-3}}}
    asked = federation(tmp_path, model, items, rounds=1, own=own)
    (report,) = run(tmp_path / "run", asked)
    assert report.outcome == "accepted"
    assert all(share["norm"] > 0 for share in report.attempts[0].aggregation["shares"])
    # Neither adapters nor the merged model stay.
    kept = {path.parent.name for path in (tmp_path / "run").rglob("*.safetensors")}
    assert kept == {"000", "001"}


def test_the_command_runs_a_plan_goes_on_and_tells_both_ways(
    model: str, items: Path, tmp_path: Path
):
    plan = plan_file(tmp_path, federation(tmp_path, model, items))
    dry = json.loads(gmpo("federate", "run", plan, "--dry-run", "--json").stdout)
    assert dry["clients"] == {"north": 19, "south": 19, "east": 19}
    assert dry["suites"] == {"own": 60}
    assert "client north: 19 training rows" in gmpo("federate", "run", plan, "--dry-run").stdout
    folder = tmp_path / "run"
    result = gmpo("federate", "run", plan, "--folder", folder, "--set", "rounds=1", "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    told = json.loads(result.stdout)
    assert told["version"] == weights_version(Path(told["model"]))
    assert [one["number"] for one in told["rounds"]] == [1]
    assert "round 1, client 1 of 3: north trained on 128 sequences" in result.stderr
    again = gmpo("federate", "run", "--folder", folder)
    assert again.exit_code == 0
    for word in ("accepted", "north", "128", told["version"][:8]):
        assert word in again.stdout
    assert "rounds is 2, and was 1" in refusal("federate", "run", plan, "--folder", folder)
    assert "name a plan" in refusal("federate", "run")
    elsewhere = tmp_path / "typo.toml"
    elsewhere.write_text(plan.read_text().replace("tiny.toml", "typo-tiny.toml"))
    (tmp_path / "typo-tiny.toml").write_text(
        (tmp_path / "tiny.toml").read_text().replace(model, f"{model}-typo")
    )
    for more in ((), ("--dry-run",)):
        said = refusal("federate", "run", elsewhere, "--folder", tmp_path / "typo", *more)
        assert f"{model}-typo" in said
    assert not (tmp_path / "typo").exists()
    assert "--set changes a plan" in refusal("federate", "run", "--folder", folder, "--set", "x=1")


def test_a_federation_that_changed_nothing_exits_with_3(model: str, items: Path, tmp_path: Path):
    wild = {"training__learning_rate": 1e30}
    plan = plan_file(tmp_path, federation(tmp_path, model, items, recipe=wild, rounds=1))
    result = gmpo("federate", "run", plan, "--folder", tmp_path / "run")
    assert result.exit_code == 3
    assert "kept" in result.stdout
    assert "north diverged and sends nothing" in result.stderr


def test_updates_of_runs_made_apart_make_the_model_that_a_federation_makes(
    finished: Path, model: str, items: Path, tmp_path: Path
):
    asked = federation(tmp_path, model, items)
    from gmpo.federated.clients import client_recipe

    start = tmp_path / "start"
    begun = gmpo("federate", "begin", model, "--to", start)
    assert begun.stdout.startswith(f"{start}: version {weights_version(Path(model))}")
    for name in asked.clients:
        recipe = client_recipe(asked, name, number=1, base=start)
        trained = gmpo(
            "train",
            write_recipe(tmp_path / f"{name}.toml", recipe),
            "--run",
            tmp_path / f"run-{name}",
            "--no-plots",
        )
        assert trained.exit_code == 0, trained.stderr
        to = tmp_path / f"{name}.safetensors"
        result = gmpo(
            "federate", "update", tmp_path / f"run-{name}", "--client", name, "--to", to, "--json"
        )
        assert result.exit_code == 0, (result.stderr, result.exception)
        assert json.loads(result.stdout)["sequences"] == 128
    files = [tmp_path / f"{name}.safetensors" for name in asked.clients]
    made = gmpo(
        *("federate", "aggregate", start, *files, "--to", tmp_path / "next"),
        *("--set", "least_cosine=-1"),
    )
    assert made.exit_code == 0, (made.stderr, made.exception)
    assert "gmpo gate" in made.stdout
    assert same_models(tmp_path / "next", finished / "models" / "001")
    for words, said in (
        (("aggregate", start, *files, "--to", tmp_path / "next"), "not overwritten"),
        (("aggregate", finished / "models" / "001", *files, "--to", tmp_path / "x"), "began with"),
        (("update", tmp_path / "run-north", "--client", "n", "--to", files[0]), "not overwritten"),
        (
            ("update", tmp_path / "run-north", "--client", "a/b", "--to", tmp_path / "n"),
            "--client is",
        ),
        (("update", tmp_path, "--client", "n", "--to", tmp_path / "n"), "is no run folder"),
        (
            (
                *("update", tmp_path / "run-north", "--client", "n", "--to", tmp_path / "n"),
                *("--base", finished / "models" / "001"),
            ),
            "name the folder that it began with",
        ),
        (
            (
                *("aggregate", start, *files, "--to", tmp_path / "x"),
                *("--set", "score_exponents.accuracy=1"),
            ),
            "agreement alone",
        ),
    ):
        assert said in refusal("federate", *words)
