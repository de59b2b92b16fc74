"""Commands about a store of PostgreSQL: none repeats the password of its URL."""

from __future__ import annotations

from pathlib import Path

from tests.commands import gmpo, refusal
from tests.registries import NAME, added

from gmpo.registry import Registry
from gmpo.store import open_store


def test_no_command_repeats_the_password_of_a_stores_url(postgres_url: str, tmp_path: Path):
    url = postgres_url.replace("gmpo@", "gmpo:secret@")
    folder = tmp_path / "models"
    with open_store(url) as store:
        version = added(Registry(store, folder), tmp_path, 1.0).version
    begun = gmpo("ab", "start", "e", "--store", url, "--control", "a", "--candidate", "b")
    assert begun.exit_code == 0, begun.stderr
    promote = ("registry", "promote", NAME, version, "--store", url, "--folder", folder)
    said = {
        begun.stdout: "gmpo ab report e --store STORE",
        refusal(*promote): "--suite SUITE --store STORE --name bot",
        refusal("gate", "a", "b", "--store", url, "--name", "other"): "gmpo:***@127.0.0.1",
    }
    for text, named in said.items():
        assert named in text
        assert "secret" not in text
