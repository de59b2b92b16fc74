"""Training in processes of their own that are killed at a chosen moment."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.forks import FORKS

from gmpo.config import RunConfig
from gmpo.trackers import feed
from gmpo.training import train

_TOUCHING = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}


@dataclass(frozen=True, kw_only=True)
class Death:
    """When SIGKILL comes: at the n-th touch of a file of the run, or after so many seconds."""

    touches: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended, how often it had touched files, and seconds of training if it lived."""

    exit_code: int
    touches: int
    seconds: float


def run_in_process(config: RunConfig, folder: Path, death: Death | None = None) -> Ended:
    """Start the run in a process of its own, or resume it."""
    touched, seconds = FORKS.Value("i", 0), FORKS.Value("d", 0.0)
    arguments = (config, folder, death or Death(), touched, seconds)
    # Forks have the environment in which their server was started, by whichever test came first.
    process = FORKS.Process(target=_train_under, args=(dict(os.environ), *arguments))
    process.start()
    process.join()
    assert process.exitcode is not None
    return Ended(exit_code=process.exitcode, touches=touched.value, seconds=seconds.value)


def _train_under(environment: dict[str, str], *arguments: Any) -> None:
    os.environ.clear()
    os.environ.update(environment)
    _train(*arguments)


def _train(config: RunConfig, folder: Path, death: Death, touched: Any, seconds: Any) -> None:
    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event not in _TOUCHING or not str(arguments[0]).startswith(str(folder)):
            return
        touched.value += 1
        if touched.value == death.touches:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    if death.seconds is not None:
        timer = threading.Timer(death.seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    feed._CLOSING_SECONDS = 300.0  # a busy machine imports trackers slowly
    resume = (folder / "recipe.toml").exists()
    started = time.monotonic()
    train(config, folder=folder, resume=resume, warn=lambda _: None)
    seconds.value = time.monotonic() - started


def digest(checkpoint: Path) -> str:
    """Of weights, of the model or of its adapters, and optimizer moments."""
    weights = list(checkpoint.glob("*/*.safetensors"))
    assert len(weights) == 1, weights
    files = (weights[0], checkpoint / "optimizer.safetensors")
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files)).hexdigest()
