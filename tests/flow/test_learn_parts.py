"""What a cycle's steps are made of, on a tiny model: training, asking, traffic."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import numpy as np
import pytest
from tests.gateways import running_gateway, tiny_backend
from tests.models import save_tiny
from tests.tiny_runs import tiny_recipe, weights

from gmpo.config import RunConfig
from gmpo.continual.plan import LearnPlan, suite_prompts, update_recipe, write_rows
from gmpo.continual.serving import served_process
from gmpo.continual.suites import ModelAsked, completion_lengths, some_items, success_shares
from gmpo.continual.traffic import open_client
from gmpo.continual.training import stability_metrics, train_run, trained_model
from gmpo.errors import ConfigError, RunStopped, ServerUnreachable
from gmpo.tracking import RunFolder

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Questions to which any first character that is a 1 is an answer now and then."""
    path = tmp_path_factory.mktemp("items") / "items.jsonl"
    write_rows(
        path, [{"id": f"i{n}", "prompt": f"{n}+{n}=", "answer": str(n % 10)} for n in range(40)]
    )
    return str(path)


def recipe(model: str, items: str, **changes) -> RunConfig:
    plan = LearnPlan(recipe=tiny_recipe(model, **changes), suites={"old": items})
    return update_recipe(plan, model=model, rows=Path(items), number=1)


def test_a_run_that_was_stopped_goes_on_to_the_weights_of_one_that_was_not(
    model: str, items: str, tmp_path: Path
):
    config = recipe(model, items, training__rounds=3)
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
    straight = train_run(tmp_path / "straight", config, threads=1)
    assert (straight.outcome, straight.message) == ("finished", "")
    metrics = tmp_path / "stopped" / "run" / "metrics.jsonl"
    with pytest.raises(RunStopped, match="go on"):
        train_run(tmp_path / "stopped", config, threads=1, should_stop=metrics.is_file)
    stopped = train_run(tmp_path / "stopped", config, threads=1)
    assert stopped.outcome == "finished"
    merged = tmp_path / "merged"
    one, other = (trained_model(run.folder, merged=merged) for run in (straight, stopped))
    # No adapters were trained, so that the checkpoints hold the whole model.
    assert not merged.exists()
    first, second = weights(one.parent), weights(other.parent)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    figures = stability_metrics(straight.folder, config)
    assert figures["rounds"] == 3
    assert 0 < figures["stability"] <= 1
    assert figures["guard_events"] == 0
    taken_back = {"attempt": 0, "round": 3, "taken": "roll_back", "to_round": 0}
    RunFolder(straight.folder).log_event(taken_back)
    # Three rounds given up beside the three that count.
    mended = stability_metrics(straight.folder, config)
    assert mended["stability"] == pytest.approx(figures["stability"] / 2)


def test_a_run_that_diverges_says_so_and_data_that_cannot_be_trained_on_are_refused(
    model: str, items: str, tmp_path: Path
):
    for name in ("wild", "refused"):
        (tmp_path / name).mkdir()
    wild = recipe(model, items, training__learning_rate=1e30, training__rounds=3)
    diverged = train_run(tmp_path / "wild", wild, threads=1)
    assert diverged.outcome == "diverged"
    assert diverged.message
    with pytest.raises(ConfigError, match="cannot be trained"):
        train_run(tmp_path / "refused", recipe(model, str(tmp_path / "none.jsonl")), threads=1)


def test_outcomes_are_asked_once_for_each_version_and_items(
    model: str, items: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    flushed: set[int] = set()
    fsync = os.fsync

    def told(descriptor: int) -> None:
        fsync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", told)
    config = tiny_recipe(model)
    asked = ModelAsked(tmp_path / "outcomes", config, samples=1, warn=print)
    prompts = suite_prompts(items)
    gone = tmp_path / "gone"
    shutil.copytree(model, gone)
    first = asked.outcomes("v1", gone, {"old": prompts})
    # They count for good, so that they are on the disk.
    kept = list((tmp_path / "outcomes").rglob("*"))
    assert len(kept) == 3
    assert {path.stat().st_ino for path in kept} <= flushed
    shutil.rmtree(gone)
    again = asked.outcomes("v1", gone, {"old": prompts})
    assert again == first
    shares = success_shares(first["old"])
    assert shares.shape == (40,)
    assert set(shares) <= {0.0, 1.0}
    assert completion_lengths(first["old"]).max() <= 3
    # Fewer items are other items, which have to be asked.
    few = some_items(prompts, 10, seed="safety")
    assert len(few) == 10
    assert few == some_items(prompts, 10, seed="safety")
    part = asked.outcomes("v1", Path(model), {"old": few})["old"]
    by_id = dict(zip([item.id for item in first["old"].items], shares, strict=True))
    assert [by_id[item.id] for item in part.items] == list(success_shares(part))


def test_a_server_gives_the_outcomes_that_the_evaluation_finds(
    model: str, items: str, tmp_path: Path
):
    prompts = suite_prompts(items)
    asked = ModelAsked(tmp_path / "outcomes", tiny_recipe(model), samples=1, warn=print)
    expected = success_shares(asked.outcomes("v1", Path(model), {"old": prompts})["old"])
    with (
        running_gateway(lambda: tiny_backend(model)) as gateway,
        open_client(f"{gateway.url}/v1") as client,
    ):
        name, version = client.served()
        assert name == "tiny"
        answers = client.ask(prompts, max_tokens=3)
        assert client.behind(version, seconds=0.1) is None
        assert client.behind("another", seconds=0.1) == f"it serves version {version}"
    assert [answer.item for answer in answers] == [prompt.id for prompt in prompts]
    assert [float(answer.is_correct) for answer in answers] == list(expected)
    assert {answer.version for answer in answers} == {version}
    assert all(answer.error is None and answer.latency_seconds > 0 for answer in answers)


def test_a_server_that_fails_is_counted_and_one_that_is_not_there_named(model: str, items: str):
    prompts = suite_prompts(items)[:3]
    with (
        running_gateway(lambda: tiny_backend(model)) as gateway,
        open_client(f"{gateway.url}/v1") as client,
    ):
        answers = client.ask(prompts, max_tokens=10_000)
        assert all("HTTP 400" in (answer.error or "") for answer in answers)
        assert not any(answer.is_correct for answer in answers)
        url = client.url
    with open_client(url) as client, pytest.raises(ServerUnreachable, match="gmpo serve"):
        client.served()
    with pytest.raises(ConfigError, match="HOST:PORT"), open_client("127.0.0.1:8000"):
        pass


def test_a_version_is_served_by_a_process_until_the_block_ends(model: str, items: str):
    prompts = suite_prompts(items)[:3]
    limits = ("--max-prompt-tokens", "120", "--max-tokens", "8")
    with (
        served_process(model, arguments=limits, threads=1, seconds=60) as url,
        open_client(url) as client,
    ):
        assert client.served()[0] == Path(model).name
        assert all(answer.error is None for answer in client.ask(prompts, max_tokens=3))
    with open_client(url) as client, pytest.raises(ServerUnreachable):
        client.served()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a child of its parent's end")
def test_a_server_does_not_outlive_a_controller_that_is_killed(model: str):
    code = (
        "import sys, time\n"
        "from gmpo.continual.serving import served_process\n"
        "with served_process(sys.argv[1], threads=1, seconds=60) as url:\n"
        "    print(url, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, model], stdout=subprocess.PIPE, text=True
    ) as controller:
        assert controller.stdout is not None
        url = controller.stdout.readline().strip()
        assert httpx2.get(f"{url}/models").status_code == 200
        controller.kill()
    deadline = time.monotonic() + 30
    while True:
        try:
            httpx2.get(f"{url}/models")
        except httpx2.TransportError:
            break
        assert time.monotonic() < deadline, "the server goes on without its controller"
        time.sleep(0.1)


def test_a_version_that_cannot_be_served_says_why(tmp_path: Path):
    said = r"^the server of the candidate ended; it said last: error: .*cannot load model"
    with (
        pytest.raises(ServerUnreachable, match=said),
        served_process(
            str(tmp_path / "nothing"), threads=1, seconds=60, what="the server of the candidate"
        ),
    ):
        pass
