"""What messages say of URLs: nothing that may be a secret."""

from __future__ import annotations

import pytest

from gmpo.shown_urls import shown_url, store_option, without_url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://ann:secret@hooks.example:8443/services/secret?key=secret", "https://hooks.example:8443"),
        ("http://[::1]:9093/api", "http://[::1]:9093"),
        ("hooks.example/services/secret", "a URL without a host"),
        ("http://ann:sec/ret@host", "a URL that cannot be read"),
    ],
)  # fmt: skip
def test_a_url_is_shown_by_its_scheme_and_host(url: str, shown: str):
    assert shown_url(url) == shown
    assert "secret" not in without_url(f"GET {url} failed", url)


def test_what_a_program_said_of_a_url_is_kept_without_its_secrets():
    url = "https://ann:secret@host/services/T0/?key=1"
    said = "no route to https://ann:secret@host: Cannot POST /services/T0/?key=1"
    assert without_url(said, url) == "no route to https://***host: Cannot POST ***/***"


def test_a_store_with_a_password_is_no_word_of_a_command(tmp_path):
    assert store_option(f"{tmp_path}/a b.db") == f" --store '{tmp_path}/a b.db'"
    assert store_option("postgresql://ann@host/db") == " --store postgresql://ann@host/db"
    assert store_option("postgresql://ann:***@host/db") == " --store STORE"
