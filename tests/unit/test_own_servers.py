"""What is needed to start a server of gmpo's, or to ask one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.models import save_tiny
from typer.testing import CliRunner

from gmpo import own_servers
from gmpo.cli import app
from gmpo.errors import DependencyError
from gmpo.own_servers import own_api_key, require_serving


@pytest.mark.parametrize(
    ("variable", "key"),
    [(None, None), ("", None), (" , ", None), ("sk-a", "sk-a"), (" , sk-b,sk-a", "sk-b")],
)
def test_the_first_key_is_sent(
    variable: str | None, key: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("GMPO_API_KEYS", raising=False)
    if variable is not None:
        monkeypatch.setenv("GMPO_API_KEYS", variable)
    assert own_api_key() == key


def without_uvicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Callable[[str], object] = own_servers.find_spec
    monkeypatch.setattr(
        own_servers, "find_spec", lambda name: None if name == "uvicorn" else found(name)
    )


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    require_serving("gmpo serve")
    without_uvicorn(monkeypatch)
    with pytest.raises(DependencyError, match=r"^a test needs uvicorn; .*'gmpo\[serve\]'$"):
        require_serving("a test")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("serve", "MODEL"), "gmpo serve"),
        (("dashboard", "--serve", "MODEL", "--store", "FOLDER/store.db"), "--serve"),
        (("learn", "--demo", "--folder", "FOLDER/demo"), "the demonstration"),
    ],
)
def test_what_would_start_a_server_says_so_before_anything_is_done(
    arguments: tuple[str, ...], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    without_uvicorn(monkeypatch)
    model = save_tiny(tmp_path / "model")
    words = [word.replace("MODEL", model).replace("FOLDER", str(tmp_path)) for word in arguments]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert f"error: {what} needs uvicorn" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
