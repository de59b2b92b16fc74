"""A worker of a benchmark that answers "about" and takes longer for a "round" than tests wait."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.worker import serve

SILENT_SECONDS = 60.0


def about() -> dict[str, Any]:
    return {"name": "silent"}


def play_round() -> dict[str, Any]:
    time.sleep(SILENT_SECONDS)
    return {}


if __name__ == "__main__":
    serve({"about": about, "round": play_round})
