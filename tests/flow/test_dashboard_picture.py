"""`scripts/dashboard_picture.py` with tiny models, for a few seconds."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from tests.programs import chromium_or_missing


@pytest.mark.usefixtures("forked")
def test_the_picture_is_drawn_over_what_a_gateway_answered(
    model: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    browser_path = chromium_or_missing()
    from scripts import dashboard_picture

    assert str(dashboard_picture.CHROMIUM) == browser_path
    out = tmp_path / "dashboard.png"
    words = [str(finished), "--control", model, "--minutes", "0.05", "--out", str(out)]
    assert dashboard_picture.main(words) == 0
    said = capsys.readouterr().out
    assert f"{out}: 3 clients asked for 0.1 minutes; " in said and "; 0 answers" not in said
    picture = out.read_bytes()
    # The signature, then a length and the name of the first part, whose first fields are these.
    assert picture.startswith(b"\x89PNG")
    assert struct.unpack(">II", picture[16:24]) == (
        dashboard_picture.WIDTH,
        dashboard_picture.HEIGHT,
    )
