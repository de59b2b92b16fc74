"""`gmpo serve` as a process of its own: it answers, changes its weights, drains, ends."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.commands import gmpo, refusal, serving_as
from tests.models import save_tiny
from tests.registries import decision

from gmpo.feedback import verdict_event
from gmpo.grading import extract_answer
from gmpo.model_files import weights_version
from gmpo.registry import Registry
from gmpo.serving.server import bound_socket
from gmpo.store import ModelVersion, open_store

serving = partial(serving_as, "tiny", "--dtype", "fp32")
ASKED = {"model": "tiny", "prompt": "12+3=", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


def test_it_answers_and_ends_with_0_after_the_requests_that_run(folder: str, tmp_path: Path):
    path = str(tmp_path / "store.db")
    with serving(folder, "--store", path) as (process, client, _):
        whole = client.post("/completions", json=ASKED).json()
        asked = {**ASKED, "max_tokens": 200, "stream": True, "temperature": 1.0, "n": 8, "seed": 1}
        with client.stream("POST", "/completions", json=asked) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert process.wait(120) == 0
        assert whole["choices"][0]["text"]
    # What was answered is in the store, the stream that ran when the signal came included.
    store = open_store(path, read_only=True)
    first, second = store.events(kinds=["answer"])
    store.close()
    assert first.request_id == whole["id"] == whole["gmpo"]["request_id"]
    assert first.model_version == second.model_version == whole["system_fingerprint"]
    assert first.payload["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert (first.payload["status"], second.payload["status"]) == (200, 200)
    assert first.payload["first_token_s"] is None
    assert 0 < second.payload["first_token_s"] < second.payload["latency_s"]


def test_hangup_loads_the_model_anew_and_a_broken_one_changes_nothing(folder: str, tmp_path: Path):
    served = tmp_path / "tiny"
    shutil.copytree(folder, served)
    path = str(tmp_path / "store.db")
    with serving(str(served), "--store", path) as (process, client, _):
        lines = iter(process.stderr.readline, "")
        first = client.get("/models").json()["data"][0]["model_version"]
        save_tiny(served, seed=1)
        process.send_signal(signal.SIGHUP)
        said = next(line for line in lines if "serves in place of" in line)
        second = client.get("/models").json()["data"][0]["model_version"]
        assert first != second and first in said and second in said
        (served / "config.json").write_text("{")
        process.send_signal(signal.SIGHUP)
        said = next(line for line in lines if "goes on serving" in line)
        assert said.startswith("error: ") and second in said
        assert client.post("/completions", json=ASKED).json()["system_fingerprint"] == second
        threading.Thread(target=lambda: list(lines), daemon=True).start()
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
    store = open_store(path, read_only=True)
    (swap,) = store.events(kinds=["swap"])
    store.close()
    assert swap.payload["previous"] == first and swap.payload["version"] == second
    assert swap.model_version == second and swap.payload["seconds"] > 0


def test_the_stores_champion_is_served_and_a_damaged_one_is_not(folder: str, tmp_path: Path):
    path = str(tmp_path / "store.db")
    other = save_tiny(tmp_path / "other", seed=1)
    with (
        open_store(path) as store,
        serving(folder, "--store", path, "--follow", "tiny", "--dtype", "bf16") as (
            process,
            client,
            _,
        ),
    ):
        lines = iter(process.stderr.readline, "")
        first = client.get("/models").json()["data"][0]["model_version"]
        # In bf16 too a version is the weights on disk.
        versions = [weights_version(Path(other)), "0" * 16]
        for version in versions:
            store.put_model_version(
                ModelVersion(
                    version=version,
                    created=1.0,
                    name="tiny",
                    path=other,
                    parent=None,
                    lineage={},
                    metrics={},
                )
            )
        store.set_champion("tiny", expected=None, version=versions[0], reason={})
        said = next(line for line in lines if "serves in place of" in line)
        assert versions[0] in said and first in said
        answer = client.post("/completions", json=ASKED).json()
        assert answer["system_fingerprint"] == versions[0]
        store.set_champion("tiny", expected=versions[0], version=versions[1], reason={})
        said = next(line for line in lines if line.startswith("error"))
        assert f"champion {versions[1]}" in said and "somebody changed them" in said
        health = client.get(str(client.base_url).replace("/v1/", "/health")).json()
        (following,) = health["following"]
        assert "somebody changed them" in following.pop("reason")
        assert following == {"name": "tiny", "wanted": versions[1], "served": versions[0]}
        assert health["routing"]["champion_not_served"] == 1
        assert health["routing"]["beside_failures"] == 0
        assert client.get("/models").json()["data"][0]["model_version"] == versions[0]
        until = time.monotonic() + 30
        while not store.alerts("firing") and time.monotonic() < until:
            time.sleep(0.05)
        (alert,) = store.alerts("firing")
        assert alert.payload["labels"]["alertname"] == "ChampionDamaged"
        assert alert.payload["annotations"]["serving"] == versions[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
        (swap,) = store.events(kinds=["swap"])
        assert (swap.payload["previous"], swap.payload["version"]) == (first, versions[0])


def test_a_release_stands_once_the_gateway_reports_it(folder: str, tmp_path: Path):
    path = str(tmp_path / "store.db")
    other = save_tiny(tmp_path / "other", seed=1)
    with (
        open_store(path) as store,
        serving(folder, "--store", path, "--follow", "tiny") as (process, client, _),
    ):
        registry = Registry(store, tmp_path / "models")
        old, new = (registry.add(one, name="tiny").version for one in (folder, other))
        registry.adopt("tiny", old, reason="first")
        registry.submit("tiny", decision(old, new))
        promote = ("registry", "promote", "tiny", new, "--store", path)
        done = gmpo(*promote, "--gateway", str(client.base_url))
        assert done.exit_code == 0, done.stderr
        assert f"reports version {new}" in done.stderr
        assert client.get("/models").json()["data"][0]["model_version"] == new
        assert client.post("/completions", json=ASKED).json()["system_fingerprint"] == new
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0


def test_what_cannot_be_served_is_refused_in_one_line(folder: str, tmp_path: Path):
    with bound_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        assert "choose another --port" in refusal("serve", folder, "--port", port)
    assert "cannot load model" in refusal("serve", str(tmp_path / "nothing"), "--port", "0")
    assert "allowed: fp32" in refusal("serve", folder, "--port", "0", "--dtype", "fp16")
    empty = tmp_path / "keys"
    empty.write_text("# none\n\n")
    assert "has no API key" in refusal("serve", folder, "--api-keys", str(empty))
    assert "say which with --store" in refusal("serve", folder, "--follow", "tiny")
    assert "--learn-anew is about what a store holds" in refusal("serve", folder, "--learn-anew")
    missing = refusal("serve", folder, "--api-keys", str(tmp_path / "none"))
    assert "cannot be read" in missing


def test_keys_come_from_the_environment_or_a_file_and_not_from_both(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "keys"
    file.write_text("# of the team\nsk-file\n")
    monkeypatch.setenv("GMPO_API_KEYS", "sk-a, sk-b")
    assert "not from both" in refusal("serve", folder, "--api-keys", str(file))
    with serving(folder) as (_, client, _):
        assert client.get("/models").status_code == 401
        for key, status in (("sk-b", 200), ("sk-file", 401), ("sk-", 401)):
            headers = {"authorization": f"Bearer {key}"}
            assert client.get("/models", headers=headers).status_code == status
    monkeypatch.setenv("GMPO_API_KEYS", " ,")
    assert "holds no key" in refusal("serve", folder)
    monkeypatch.delenv("GMPO_API_KEYS")
    assert "one key a line" in refusal("serve", folder, "--api-keys", str(tmp_path / "none"))
    with serving(folder, "--api-keys", str(file)) as (_, client, _):
        headers = {"authorization": "Bearer sk-file"}
        assert client.get("/models", headers=headers).status_code == 200


def _ended_answer(client: httpx2.Client) -> dict[str, Any]:
    """An answer of the random model that ends by itself and has a number in it."""
    for seed in range(50):
        asked = {"prompt": "2+2=", "max_tokens": 100, "temperature": 1.0, "store": True}
        answer = client.post("/completions", json={**ASKED, **asked, "seed": seed}).json()
        (choice,) = answer["choices"]
        if choice["finish_reason"] == "stop" and extract_answer(choice["text"]):
            return answer
    raise AssertionError("no answer ended")


def test_texts_of_clients_that_allow_it_become_rows(folder: str, tmp_path: Path):
    path = str(tmp_path / "store.db")
    with serving(folder, "--store", path, "--record-texts") as (process, client, _):
        allowed = client.post("/completions", json={**ASKED, "store": True}).json()
        client.post("/completions", json={**ASKED, "prompt": "1+1="})
        liked = _ended_answer(client)
        said = client.post("/feedback", json={"request_id": liked["id"], "thumbs": "up"})
        assert said.status_code == 200, said.text
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    with open_store(path) as store:
        text = store.events(kinds=["text"])[0]
        assert text.payload["completions"] == [allowed["choices"][0]["text"]]
        assert store.count_events(kinds=["answer"]) == store.count_events(kinds=["text"]) + 1
        store.add_events([verdict_event(allowed["id"], by="test", reference="15")])
    done = gmpo("data", "collect", "--store", path, "--out", tmp_path / "rows.jsonl", "--json")
    assert '"rows": 2' in done.stdout, done.stderr
    row, voted = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert (row["prompt"], row["answer"]) == ([{"role": "user", "content": "12+3="}], "15")
    answer = extract_answer(liked["choices"][0]["text"])
    assert (voted["prompt"][0]["content"], voted["answer"]) == ("2+2=", answer)
    assert (row["confirmed_by"], voted["confirmed_by"]) == ("verdict", "votes")
    assert "--record-texts is about what a store holds" in refusal(
        "serve", folder, "--record-texts"
    )
