"""`gmpo registry` over a real store: from the first version to a rollback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.commands import gmpo, process, refusal
from tests.registries import decision, model_folder

from gmpo.errors import ConfigError, StoreError
from gmpo.model_files import weights_version
from gmpo.registry import Registry
from gmpo.registry.mirror import mirror_to_mlflow
from gmpo.store import open_store

# MLflow uses what SQLAlchemy will drop.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "store.db")


def add(store: str, tmp_path: Path, value: float, *more: str) -> str:
    source = model_folder(tmp_path / f"run-{value}", value)
    done = gmpo("registry", "add", source, "--name", "bot", "--store", store, "--json", *more)
    assert done.exit_code == 0, done.stderr
    version = json.loads(done.stdout)["version"]
    assert version == weights_version(source)
    return version


def roles(store: str) -> dict[str, str]:
    listed = gmpo("registry", "list", "bot", "--store", store, "--json")
    return {row["version"]: row["role"] for row in json.loads(listed.stdout)}


def test_from_the_first_version_to_a_rollback(store: str, tmp_path: Path):
    old = add(store, tmp_path, 1.0, "--metric", "accuracy=0.5")
    new = add(store, tmp_path, 2.0, "--parent", old[:6])
    assert (tmp_path / "models" / new / "config.json").is_file()
    assert (
        "is the champion of bot"
        in gmpo("registry", "adopt", "bot", old[:8], "--store", store).stdout
    )
    undecided = refusal("registry", "promote", "bot", new, "--store", store)
    assert "no decision of the gate" in undecided
    assert f"gmpo gate CHAMPION {new[:8]} --suite SUITE --store {store} --name bot" in undecided
    with open_store(store) as opened:
        Registry(opened, tmp_path / "models").submit("bot", decision(old, new))
    assert roles(store) == {old: "champion", new: "candidate"}
    shown = process("registry", "show", "bot", "--store", store)
    assert f"candidate {new}: pass: +0.0 points" in shown.stdout, shown.stderr
    done = gmpo("registry", "promote", "bot", new[:8], "--by", "Ada", "--store", store)
    assert f"{new} is the champion of bot in place of {old}" in done.stdout
    assert roles(store) == {old: "predecessor", new: "champion"}
    # Once more changes nothing: the history below has one promotion.
    assert gmpo("registry", "promote", "bot", new, "--store", store).exit_code == 0
    back = gmpo("registry", "rollback", "bot", "--reason", "slow", "--store", store, "--json")
    assert json.loads(back.stdout)["version"] == old
    assert roles(store) == {old: "champion", new: "taken back"}
    # What was taken back is not promoted by what was decided before.
    file = tmp_path / "decision.json"
    file.write_text(json.dumps(decision(old, new).as_dict()))
    for more in ((), ("--evidence", file)):
        stale = refusal("registry", "promote", "bot", new, "--store", store, *more)
        assert f"{new} was promoted since and taken back (slow); gate" in stale
    assert roles(store) == {old: "champion", new: "taken back"}
    listed = gmpo("registry", "list", "--store", store)
    assert old in listed.stdout and "accuracy 0.5" in listed.stdout
    history = json.loads(gmpo("registry", "show", "bot", "--store", store, "--json").stdout)
    assert [row["reason"]["kind"] for row in history["history"]] == [
        "adoption",
        "promotion",
        "rollback",
    ]
    assert history["history"][1]["reason"]["by"] == "Ada"


def test_evidence_from_a_file(store: str, tmp_path: Path):
    old, new = add(store, tmp_path, 1.0), add(store, tmp_path, 2.0)
    assert gmpo("registry", "adopt", "bot", old, "--store", store).exit_code == 0
    file = tmp_path / "decision.json"
    file.write_text(json.dumps(decision(old, new, gain=-0.2).as_dict()))
    promote = ("registry", "promote", "bot", new, "--store", store, "--evidence", file)
    assert "is 'fail', not 'pass'" in refusal(*promote)
    file.write_text("[]")
    assert "no JSON object" in refusal(*promote)
    file.unlink()
    assert "cannot be read" in refusal(*promote)
    file.write_text(json.dumps(decision(old, new).as_dict()))
    assert gmpo(*promote).exit_code == 0


def test_damage_is_found_and_garbage_cleared_away(store: str, tmp_path: Path):
    old, loose = add(store, tmp_path, 1.0), add(store, tmp_path, 2.0)
    gmpo("registry", "adopt", "bot", old, "--store", store)
    assert gmpo("registry", "verify", "--store", store).exit_code == 0
    (tmp_path / "models" / loose / "config.json").write_text("{}")
    damaged = gmpo("registry", "verify", loose, "--store", store)
    assert damaged.exit_code == 2 and "config.json was changed" in damaged.stdout
    planned = gmpo("registry", "gc", "bot", "--keep", "0", "--dry-run", "--store", store)
    assert f"kept {old}: champion" in planned.stdout and "would remove 1 folders" in planned.stdout
    done = gmpo("registry", "gc", "bot", "--keep", "0", "--store", store, "--json")
    assert json.loads(done.stdout)["removed"] == [loose]
    assert not (tmp_path / "models" / loose).exists()


def test_refusals(store: str, tmp_path: Path):
    old = add(store, tmp_path, 1.0)
    assert "no version begins" in refusal("registry", "adopt", "bot", "zzz", "--store", store)
    rollback = ("registry", "rollback", "bot", "--reason", "x", "--store", store)
    assert "no predecessor" in refusal(*rollback)
    assert "write NAME=NUMBER" in refusal(
        "registry", "add", tmp_path / "run-1.0", "--name", "bot", "--store", store, "--metric", "a"
    )
    assert "version" in refusal(
        "registry", "add", tmp_path / "run-1.0", "--name", "else", "--store", store
    )
    gmpo("registry", "adopt", "bot", old, "--store", store)
    assert "no predecessor" in refusal(*rollback)


@pytest.mark.parametrize(
    "command",
    [
        ("list", "bto"),
        ("show", "bto"),
        ("promote", "bto", "VERSION"),
        ("rollback", "bto", "--reason", "slow"),
        ("gc", "bto"),
    ],
    ids=" ".join,
)
def test_a_mistyped_model_is_refused_with_the_names_there_are(
    command: tuple[str, ...], store: str, tmp_path: Path
):
    version = add(store, tmp_path, 1.0)
    words = [version if word == "VERSION" else word for word in command]
    message = refusal("registry", *words, "--store", store)
    assert message.startswith("no version of a model 'bto' is in the store; it has versions of bot")


def test_a_rollback_without_a_reason_is_refused(store: str, tmp_path: Path):
    old = add(store, tmp_path, 1.0)
    gmpo("registry", "adopt", "bot", old, "--store", store)
    assert "--reason is empty" in refusal(
        "registry", "rollback", "bot", "--reason", " ", "--store", store
    )


def test_the_history_tells_what_became_of_each_cycle(store: str, tmp_path: Path):
    old = add(store, tmp_path, 1.0)
    gmpo("registry", "adopt", "bot", old, "--store", store)
    reason = "Data validation failed: poisoned"
    result = {"reason": reason, "step": "validate", "sentence": "59 disputed"}
    done = {"update": {"passed": True, "sentence": "version v2", "details": {}}}
    with open_store(store) as opened:
        cycle = opened.begin_cycle("bot", state="validate", payload={})
        told = {"reports": {}, "result": result}
        opened.move_cycle(cycle, state="refused", payload=told, ends=True)
        goes_on = opened.begin_cycle("bot", state="validate", payload={})
        opened.move_cycle(goes_on, state="evaluate", payload={"reports": done})
    shown = gmpo("registry", "show", "bot", "--store", store).stdout
    first, second = (line for line in shown.splitlines() if line.startswith("cycle "))
    assert first.endswith(f": refused: {reason} (validate: 59 disputed)")
    assert second.endswith(": goes on at evaluate (update: version v2)")
    rows = json.loads(gmpo("registry", "show", "bot", "--store", store, "--json").stdout)["cycles"]
    assert [row["state"] for row in rows] == ["refused", "evaluate"]
    assert [row["reason"] for row in rows] == [reason, None]


@pytest.mark.parametrize(
    "command",
    [
        ("registry", "list"),
        ("registry", "adopt", "bot", "ab"),
        ("registry", "promote", "bot", "ab"),
        ("registry", "rollback", "bot", "--reason", "slow"),
        ("registry", "gc", "bot"),
        ("ab", "stop", "greeting"),
        ("data", "purge", "--unit", "ada"),
        ("data", "purge", "--unit", "ada", "--dry-run"),
        ("gate", "old", "new", "--name", "bot"),
    ],
    ids=" ".join,
)
def test_a_mistyped_store_is_refused_and_not_made(command: tuple[str, ...], tmp_path: Path):
    absent = tmp_path / "absent.db"
    message = refusal(*command, "--store", absent)
    assert f"there is no store at {absent}; check the path" in message
    assert not absent.exists()


def test_a_mirror_in_mlflow_follows(store: str, tmp_path: Path):
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    old = add(store, tmp_path, 1.0, "--mlflow", uri)
    new = add(store, tmp_path, 2.0)
    gmpo("registry", "adopt", "bot", old, "--store", store, "--mlflow", uri)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)

    def aliases() -> dict[str, str]:
        found = client.get_registered_model("bot").aliases
        return {
            alias: client.get_model_version("bot", number).tags["gmpo.version"]
            for alias, number in found.items()
        }

    assert aliases() == {"champion": old}
    with open_store(store) as opened:
        registry = Registry(opened, tmp_path / "models")
        registry.submit("bot", decision(old, new), approval="auto")
    done = gmpo("registry", "mirror", "bot", "--store", store, "--mlflow", uri)
    assert done.exit_code == 0 and "0 of its versions were new" in done.stdout
    assert aliases() == {"champion": new, "previous": old}
    gmpo("registry", "rollback", "bot", "--reason", "x", "--store", store, "--mlflow", uri)
    assert aliases() == {"champion": old}
    assert len(client.search_model_versions("name = 'bot'")) == 2


def test_a_mirror_that_fails_stops_nothing(store: str, tmp_path: Path):
    old = add(store, tmp_path, 1.0)
    (tmp_path / "mlflow.db").write_text("no database")
    told: list[str] = []
    with open_store(store) as opened:
        registry = Registry(
            opened,
            tmp_path / "models",
            mirrors=[lambda store, name: refuse(store, name)],
            tell=told.append,
        )
        assert registry.adopt("bot", old, reason="first").version == old
        assert registry.num_mirror_failures == 1 and "a mirror was not told" in told[0]
        with pytest.raises(ConfigError, match="does not take"):
            mirror_to_mlflow(opened, "a/b", uri="sqlite://")


def test_a_mirror_that_is_not_there_is_named_without_its_password(
    store: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    open_store(store).close()
    with (
        open_store(store) as opened,
        pytest.raises(StoreError, match=r"at http://127\.0\.0\.1:1 does not") as refused,
    ):
        mirror_to_mlflow(opened, "bot", uri="http://ann:secret@127.0.0.1:1")
    assert "secret" not in str(refused.value)


def refuse(store: object, name: str) -> None:
    raise StoreError(f"no room for {name}")
