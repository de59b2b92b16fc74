"""A whole check leaves out no test for want of a server or a browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.programs import missing, program

REPOSITORY = Path(__file__).resolve().parents[2]
CHECK = (REPOSITORY / ".ci" / "run").read_text()


def sources() -> dict[str, str]:
    return {
        str(path.relative_to(REPOSITORY)): path.read_text()
        for path in sorted((REPOSITORY / "tests").rglob("*.py"))
        if path != Path(__file__)
    }


def test_a_missing_program_skips_its_test_and_fails_it_where_ci_is_set(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="there is no nothing-of-this-name here"):
        program("nothing-of-this-name", package="nothing")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="apt-get install nothing"):
        program("nothing-of-this-name", package="nothing")
    with pytest.raises(pytest.fail.Exception, match="there is no PostgreSQL server here"):
        missing("PostgreSQL server", package="postgresql")


def test_the_whole_check_installs_every_package_that_a_test_needs():
    named = {
        package
        for source in sources().values()
        for package in re.findall(r'package="([\w-]+)', source)
    }
    assert named == {"chromium", "postgresql", "prometheus", "prometheus-alertmanager"}
    for package in named:
        assert f"missing+=({package})" in CHECK, package
    assert "CI=true make test" in CHECK


def test_no_test_skips_by_itself_for_want_of_a_program():
    found = [
        (name, line.strip())
        for name, source in sources().items()
        for line in source.splitlines()
        if re.search(r'skip\(.*(install|apt)|importorskip\("playwright', line)
    ]
    # A wheel of pip, which `make venv` installs, is no program.
    assert {name for name, _ in found} <= {
        "tests/flow/test_cli.py",
        "tests/equivalence/test_real_model.py",
    }, found
