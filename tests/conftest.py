"""The environment every test runs in, and the fixtures that more than one folder uses."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings

# Set before torch and the hub client are imported, because both read them once.
# A parallel worker gets one thread: with more, workers fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# Trackio reads its variable once, whichever test imports it first; one folder a process of pytest.
_TRACKIO = tempfile.TemporaryDirectory(prefix="gmpo-trackio-", ignore_cleanup_errors=True)
os.environ["TRACKIO_DIR"] = _TRACKIO.name

# A shell starts what runs in its background deaf to Ctrl-C, which the programs that tests start
# would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every run, and no time limit an example: a shared machine may be slow.
settings.register_profile("steady", derandomize=True, deadline=None)
# For the mutation check, which asks only whether a test fails, not for the smallest example.
settings.register_profile(
    "no_shrinking", settings.get_profile("steady"), phases=[Phase.explicit, Phase.generate]
)
settings.load_profile("steady")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of `--dist loadgroup`: groups are files (tests/scheduling.py)."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from tests.scheduling import FileScheduling

    return FileScheduling(config, log)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of maths problem sets whose licences forbid shipping them with the package."""
    named = os.environ.get("GMPO_MATH_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data" / "math"
    if not folder.is_dir():
        pytest.skip(f"no maths data at {folder}; set GMPO_MATH_DATA to a folder of JSONL files")
    return folder


@pytest.fixture(scope="session")
def offline_trackers() -> None:
    """Trackers write below the tests' own folder (Trackio's is set above)."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_API_KEY"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def mlflow_store(offline_trackers: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database to copy; making its tables takes seconds."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments(max_results=1)
    return path
