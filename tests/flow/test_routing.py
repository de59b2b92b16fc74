"""`gmpo serve` over several models, by a file, a server or an experiment; and `gmpo quality`."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest
from tests.commands import gmpo, refusal, serving_as
from tests.models import save_tiny
from tests.upstreams import refuses, running_upstream, says

from gmpo.recipe import dump_recipe, load_recipe
from gmpo.serving.verifying import graded_task
from gmpo.store import Event, open_store

serving = partial(serving_as, "bot")
ASKED = {"model": "bot", "prompt": "12+3=", "max_tokens": 4, "temperature": 0}


def configured(folder: Path, text: str) -> str:
    path = folder / "serve.toml"
    path.write_text(text)
    return str(path)


def test_a_configuration_is_served_with_fallback_and_recorded(tmp_path: Path):
    store = str(tmp_path / "store.db")
    with running_upstream(refuses(500)) as bad, running_upstream(says("4", "2")) as good:
        config = configured(
            tmp_path,
            f"""
            name = "bot"
            main = "new"
            fallback = ["old"]
            [backends.new]
            url = "{bad.url}"
            model = "bot-4"
            version = "v4"
            [backends.old]
            url = "{good.url}"
            model = "bot-3"
            [quality]
            verify = true
            """,
        )
        with serving("--config", config, "--store", store) as (process, client, said):
            assert "version v4" in said
            body = {**ASKED, "metadata": {"reference": "42"}}
            answer = client.post("/completions", json=body).json()
            assert answer["choices"][0]["text"] == "42"
            assert answer["gmpo"]["fallback_reason"] == "failed"
            assert answer["gmpo"]["quality_components"]["verified"] == 1.0
            thumbs = {"request_id": answer["id"], "thumbs": "up"}
            assert client.post("/feedback", json=thumbs).status_code == 200
            process.send_signal(signal.SIGHUP)
            assert "no model in this process" in process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    with open_store(store, read_only=True) as kept:
        (event,) = kept.events(kinds=["answer"])
        assert event.payload["served_variant"] == "old" and event.model_version == "bot-3"
        assert [one.payload["score"] for one in kept.events(kinds=["feedback"])] == [1.0]


def test_a_tasks_own_scorer_grades_what_is_served(tmp_path: Path):
    recipe = tmp_path / "own.toml"
    recipe.write_text('[task]\nkind = "countdown"\ntrain_items = 5\nheld_out_items = 2\n')
    item = next(iter(graded_task(str(recipe)).items))
    folder = save_tiny(tmp_path / "bot")

    def verdicts(*arguments: str, store: str) -> list[float | None]:
        found = []
        with serving(*arguments, "--task", str(recipe), "--store", store) as (process, client, _):
            for metadata in ({"numbers": "3, 5, 7", "target": "26"}, {"item": item}, {"a": "b"}):
                answer = client.post("/completions", json={**ASKED, "metadata": metadata}).json()
                found.append(answer["gmpo"]["quality_components"].get("verified"))
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        return found

    store = str(tmp_path / "engine.db")
    assert verdicts(folder, "--dtype", "fp32", store=store) == [0.0, 0.0, None]
    with running_upstream(says("7*", "3+5")) as server:
        store = str(tmp_path / "upstream.db")
        assert verdicts("bot", "--upstream", server.url, store=store) == [1.0, 0.0, None]
        assert not any("metadata" in body for body in server.bodies)
    with open_store(store, read_only=True) as kept:
        told = [one.payload["quality_components"] for one in kept.events(kinds=["answer"])]
    assert [one.get("verified") for one in told] == [1.0, 0.0, None]


def test_an_experiment_between_two_models_of_one_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GMPO_UPSTREAM_API_KEY", "sk-up")
    store = str(tmp_path / "store.db")
    begin = ["ab", "start", "e", "--store", store, "--control", "old", "--candidate", "new"]
    done = gmpo(*begin)
    assert done.exit_code == 0, done.stderr
    assert "gmpo serve --experiment e" in " ".join(done.stdout.split())
    with running_upstream(says("4")) as server:
        wanted = ("old", "--name", "bot", "--upstream", server.url)
        split = ("--store", store, "--experiment", "e")
        with serving(*wanted, *split) as (process, client, _):
            for turn in range(12):
                headers = {"x-gmpo-unit": f"u{turn}"}
                assert client.post("/completions", json=ASKED, headers=headers).status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        assert {body["model"] for body in server.bodies} == {"old", "new"}
        assert "authorization: Bearer sk-up" in server.headers[0]
    report = gmpo("ab", "report", "e", "--store", store, "--json")
    assert report.exit_code == 0, report.stderr
    assert json.loads(report.stdout)["num_units"] == 12


def test_two_engines_of_an_experiment_answer_each_its_units(tmp_path: Path):
    folders = [save_tiny(tmp_path / name, seed=seed) for seed, name in enumerate(("bot", "new"))]
    store = str(tmp_path / "store.db")
    begin = ["ab", "start", "e", "--store", store, "--control", folders[0]]
    assert gmpo(*begin, "--candidate", folders[1]).exit_code == 0
    asked = (folders[0], "--dtype", "fp32", "--store", store, "--experiment", "e")
    with serving(*asked) as (process, client, said):
        versions = {}
        for turn in range(12):
            headers = {"x-gmpo-unit": f"u{turn}"}
            told = client.post("/completions", json=ASKED, headers=headers).json()["gmpo"]
            versions.setdefault(told["variant"], set()).add(told["model_version"])
        assert versions.keys() == {"control", "candidate"}
        (control,), (candidate,) = versions["control"], versions["candidate"]
        assert control != candidate and control in said
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_what_contradicts_itself_is_refused_in_one_line(tmp_path: Path):
    text = 'name = "b"\nmain = "x"\n[backends.x]\nurl = "http://127.0.0.1:9/v1"\nmodel = "m"\n'
    config = configured(tmp_path, text)
    store = str(tmp_path / "store.db")
    assert "name a MODEL, or give --config" in refusal("serve", "--port", "0")
    assert "leave MODEL out" in refusal("serve", "m", "--config", config, "--port", "0")
    assert "leave --dtype out" in refusal("serve", "--config", config, "--dtype", "fp32")
    assert "leave --task out" in refusal("serve", "--config", config, "--task", "quickstart")
    assert "there is no recipe 'none'" in refusal("serve", "m", "--task", "none", "--port", "0")
    server = ("--upstream", "http://127.0.0.1:1/v1", "--port", "0")
    for limit in ("--max-tokens", "--max-prompt-tokens", "--max-rows"):
        assert f"{limit} is a limit of models in this process" in refusal(
            "serve", "m", *server, limit, "5"
        )
    assert "must begin with http" in refusal("serve", "m", "--upstream", "host:1", "--port", "0")
    assert "say which with --store" in refusal("serve", "m", "--experiment", "e", "--port", "0")
    missing = refusal("serve", "m", "--experiment", "e", "--store", store, "--port", "0")
    assert "no experiment 'e'" in missing
    begin = ["ab", "start", "e", "--store", store, "--control", "old", "--candidate", "new"]
    assert gmpo(*begin).exit_code == 0
    other = refusal("serve", "m", "--experiment", "e", "--store", store, "--port", "0")
    assert "compares old and new, and MODEL is m" in other
    key = configured(tmp_path, text + 'api_key_env = "NO_SUCH_KEY"\n')
    assert "NO_SUCH_KEY, which is not set" in refusal("serve", "--config", key, "--port", "0")
    shadow = configured(tmp_path, text + '[shadow]\nbackend = "x"\n')
    assert "shadow names something in the store" in refusal("serve", "--config", shadow)


def test_what_is_quickly_refused_does_not_wait_for_the_tasks_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def slow(task: object) -> NoReturn:
        pytest.fail("the task was made before the refusal")

    monkeypatch.setattr("gmpo.serving.verifying.build_task", slow)
    task = ("--task", "quickstart", "--port", "0")
    experiment = ("--experiment", "e", "--store", str(tmp_path / "store.db"))
    assert "no experiment 'e'" in refusal("serve", "m", *experiment, *task)
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(dump_recipe(load_recipe("quickstart")))
    assert "has no checkpoint yet" in refusal("serve", str(run), *task)
    config = configured(
        tmp_path,
        'name = "b"\nmain = "x"\nquality.task = "quickstart"\n[backends.x]\n'
        'url = "http://127.0.0.1:9/v1"\nmodel = "m"\napi_key_env = "NO_SUCH_KEY"\n',
    )
    assert "NO_SUCH_KEY, which is not set" in refusal("serve", "--config", config, "--port", "0")


def test_answers_that_all_fell_back_set_no_threshold(tmp_path: Path):
    path = str(tmp_path / "store.db")
    payload = {"status": 200, "fell_back": True, "quality_components": {"distinct": 1.0}}
    with open_store(path) as store:
        store.add_events([Event(kind="answer", time=1.0, payload=payload)] * 3)
    said = refusal("quality", str(tmp_path / "quality.json"), "--store", path)
    assert "no answer to set a threshold by; left out: 3 fell back" in said
    assert 'quality.mode = "observe"' in said


def test_a_threshold_without_truth_says_how_answers_get_graded(tmp_path: Path):
    path = str(tmp_path / "store.db")
    components = {"probability": 0.5, "distinct": 1.0, "terminated": 1.0}
    payload = {"status": 200, "fell_back": False, "quality_components": components}
    answered = [
        Event(kind="answer", time=1.0, payload=payload, request_id=str(number))
        for number in range(40)
    ]
    with open_store(path) as store:
        store.add_events(answered)
    said = gmpo("quality", tmp_path / "quality.json", "--store", path).stdout
    assert "nothing is known to be right and wrong" in said
    assert all(way in said for way in ("quality.verify", "serve --task", "quality.task"))


def test_a_threshold_is_set_from_recorded_answers_and_serves(tmp_path: Path):
    path = str(tmp_path / "store.db")
    out = str(tmp_path / "quality.json")
    with open_store(path) as store:
        store.add_events(
            [
                Event(
                    kind="answer",
                    time=float(number),
                    payload={
                        "status": 200,
                        "fell_back": False,
                        "quality_components": {
                            "probability": number / 40,
                            "distinct": 1.0,
                            "terminated": 1.0,
                            "verified": float(number > 10),
                        },
                    },
                    request_id=str(number),
                )
                for number in range(1, 41)
            ]
        )
    done = gmpo("quality", out, "--store", path, "--target", "0.1")
    assert done.exit_code == 0, done.stderr
    # 30 right answers, k = floor(.1 * 31) = 3: the third lowest of 11/40 ... is 13/40.
    threshold = (0.05 + 0.95 * 13 / 40) ** (1 / 3)
    assert f"threshold {threshold:.4f}: 9.7 % of good answers" in done.stdout
    assert "40 answers: 30 right, 10 wrong, 0 not judged" in done.stdout
    assert "100 % of the wrong answers are below it" in done.stdout
    assert "probability 1.00" in done.stdout
    low = says("4", logprob=-5.0)
    with running_upstream(low) as unsure, running_upstream(says("5", logprob=-0.1)) as sure:
        config = configured(
            tmp_path,
            f"""
            name = "bot"
            main = "a"
            fallback = ["b"]
            backends.a = {{ url = "{unsure.url}", model = "a" }}
            backends.b = {{ url = "{sure.url}", model = "b" }}
            quality = {{ mode = "buffered", calibration = "{out}" }}
            """,
        )
        with serving("--config", config) as (_, client, _):
            told = client.post("/completions", json=ASKED).json()["gmpo"]
            assert told["fallback_reason"] == "low_quality" and told["variant"] == "b"
    assert "too few" in refusal("quality", out, "--store", path, "--target", "0.001")
    assert "no store at" in refusal("quality", out, "--store", str(tmp_path / "none.db"))
