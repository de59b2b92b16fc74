"""What every fork of the tests begins with; the process that forks them imports it, and no test."""

from __future__ import annotations

import os
from importlib import import_module

# Read when the hub's client and transformers are imported; the command sets them before that.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

for _module in (
    "hypothesis",
    "psycopg",
    "pytest",
    "gmpo.cli",
    "gmpo.continual.work",
    "gmpo.registry",
    "gmpo.serving.engine",
    "gmpo.serving.server",
    "gmpo.training",
    "gmpo.study.report",
    "gmpo.tuning.trials",
    "tests.killed_runs",
    "tests.learning",
):
    import_module(_module)
