"""A run's folder: its recipe, its metrics, and some of its rollouts, as they happen."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gmpo.errors import DataError, RunFolderError
from gmpo.kernels.library import build

__all__ = [
    "METRICS",
    "METRIC_FAMILIES",
    "WEIGHTS_REMOVED",
    "RunFolder",
    "builds_of",
    "fresh_folder",
    "no_checkpoint",
    "provenance",
    "read_lines",
]

WEIGHTS_REMOVED = "weights-removed.txt"
"""File of a run whose checkpoints were removed on purpose; it says why."""

METRICS: Mapping[str, str] = {
    "rollout/reward": "mean reward of the round's rollouts",
    "rollout/groups": "groups sampled",
    "rollout/trained_groups": "groups the round trains on; the others were dead and refilled",
    "rollout/dead_groups": "groups whose rollouts all earned the same, so that no gradient comes",
    "rollout/tokens": "completion tokens of the round, all groups sampled",
    "rollout/completion_tokens": "mean completion length",
    "rollout/given_tokens_fraction": "share of completion tokens that a tool put in",
    "rollout/truncated_fraction": "share of completions cut by the token limit",
    "rollout/entropy": "mean of -log pi over sampled tokens, an estimate of the token entropy",
    "rollout/mismatch_mean": "mean |log pi_trainer - log pi_sampler| on unchanged weights",
    "rollout/mismatch_max": "largest |log pi_trainer - log pi_sampler| on unchanged weights",
    "rollout/old_from_sampler": "1 if sampler log-probabilities served as the old ones",
    "grading/timeouts_total": "answers whose grading ran out of time in the round",
    "grading/scorer_errors_total": "answers on which a task's own scorer raised in the round",
    "rollout/errors_total": "rollouts of the round that failed and were not used",
    "time/rollout_seconds": "seconds of sampling in the round",
    "time/reward_seconds": "seconds of grading in the round",
    "time/update_seconds": "seconds of optimizer steps, old log-probs and gradient cosine included",
    "time/tokens_per_second": "completion tokens of the round over its rollout seconds",
    "tracking/errors_total": "calls of trackers that failed since the round before",
    "tracking/dropped_total": "rows that trackers were not given since the round before",
    "memory/peak_gib": "largest resident (CPU) or allocated (accelerator) memory so far",
    "update/loss": "mean loss of the step's rollouts",
    "update/gradient_norm": "gradient norm before clipping",
    "update/learning_rate": "step size",
    "update/disturbed_weights": "trained tensors that something other than the steps has changed",
    "update/skipped_steps_total": "steps not taken because their gradient was out of the ordinary",
    "update/live_rollouts": "rollouts the step was computed on; fast leaves out advantage 0",
    "update/gradient_cosine_grpo": "cosine between this objective's gradient and GRPO's",
    "update/entropy": "mean token entropy of the step's rollouts, measured with an entropy bonus",
    "ratio/min": "smallest importance ratio of the step, before the clip",
    "ratio/max": "largest importance ratio of the step, before the clip",
    "ratio/log_q01": "1 % quantile of the log-ratio",
    "ratio/log_q50": "median of the log-ratio",
    "ratio/log_q99": "99 % quantile of the log-ratio",
    "ratio/am_gm_gap": "mean over sequences of log(arithmetic mean / geometric mean of ratios)",
    "ratio/effective_sample_fraction": "(sum r)^2 / (N sum r^2) over tokens",
    "clip/low_fraction": "share of counted tokens that the lower clip changed",
    "clip/high_fraction": "share of counted tokens that the upper clip changed",
    "kl_old/k1": "k1 estimate of KL(old || policy)",
    "kl_ref/k3": "k3 estimate of KL(policy || reference)",
    "adaptive/clip_low": "lower half-width of the clip in the round",
    "adaptive/clip_high": "upper half-width of the clip in the round",
    "adaptive/learning_rate_factor": "factor on the scheduled step size in the round",
    "adaptive/reward_floor": "floor of geometrically combined rewards in the round",
    "adaptive/reward_at_first_floor": "mean reward, had the floor stayed where the recipe begins",
    "evaluation/accuracy": "share of held-out items answered correctly, greedy, during training",
    "evaluation/reward": "mean reward of held-out items, greedy, during training",
}
"""Every metric a run may log; `METRIC_FAMILIES` besides."""

METRIC_FAMILIES: Mapping[str, str] = {
    "rollout/reward/": "mean of one reward component",
    "rollout/reward_deviation/": "standard deviation of one reward component",
    "rollout/reward_absent_fraction/": "share of rewarded rollouts without the component",
    "rollout/reward_errors_total/": "rollouts that the component's function failed on",
    "reward_metric/": "what a reward function logged by this name, averaged over its calls",
}
"""Beginnings of metrics that end in a name of the recipe's or of a reward function's."""


_BY_ROUND = ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl")
"""Files whose lines are of a round."""


class RunFolder:
    """Writes `recipe.toml`, `metrics.jsonl` and `rollouts.jsonl` under one folder.

    Args:
        path: created if it is absent.
        option: of the command that names the folder, for messages.

    Raises:
        RunFolderError: the folder cannot be created or written; the path and cause are named.
    """

    def __init__(self, path: str | Path, *, option: str = "--run") -> None:
        self.path = Path(path)
        self._followers: list[Callable[[Mapping[str, Any]], None]] = []
        try:
            self._made = [each for each in (self.path, *self.path.parents) if not each.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.write_bytes(b"0" * 4096)
            probe.unlink()
        except OSError as error:
            raise RunFolderError(
                f"{'run' if option == '--run' else 'study'} folder {self.path} cannot be written: "
                f"{error.strerror}; choose another with {option}, or free space and permissions"
            ) from None

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def rounds(self) -> Path:
        """Where rollouts lie that a resumed run would need."""
        return self.path / "rounds"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes off this folder; the lock ends with the process, however it ends.

        Its file stays beside what was written; where nothing was, it goes too, and after an error
        the folder with it, and its parents, if they are this object's making.

        Raises:
            RunFolderError: another process trains here.
        """
        with (self.path / ".lock").open("a", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunFolderError(
                    f"run folder {self.path} is being trained in by another process; wait for it, "
                    "stop it, or choose another folder with --run"
                ) from None
            is_refused = True
            try:
                yield
                is_refused = False
            finally:
                lock = Path(file.name)
                if [lock] == list(self.path.iterdir()):
                    lock.unlink()
                    if is_refused:
                        self._remove_made()

    def _remove_made(self) -> None:
        with suppress(OSError):  # a folder that another process writes to stays
            for each in self._made:
                each.rmdir()

    def write_text(self, name: str, text: str) -> None:
        """Write a small file of the run, whole or not at all.

        Raises:
            RunFolderError: it cannot be written; what was there before is untouched.
        """
        partial = self.path / f".{name}.partial"
        self._write(partial.name, text, mode="w")
        partial.replace(self.path / name)

    def follow(self, receive: Callable[[Mapping[str, Any]], None]) -> None:
        """Let `receive` have every later row of `metrics.jsonl`, once it is written."""
        self._followers.append(receive)

    def unfollow(self, receive: Callable[[Mapping[str, Any]], None]) -> None:
        """Let `receive`, which followed, have no more of them."""
        self._followers.remove(receive)

    def log_metrics(self, kind: str, values: Mapping[str, float], **position: int) -> None:
        """Append one line to `metrics.jsonl`.

        Args:
            kind: "step", "round" or "evaluation".
            values: by metric name, a key of `METRICS` or of one of the `METRIC_FAMILIES`.
            position: round and step numbers.

        Raises:
            RunFolderError: it cannot be written.
        """
        unknown = [
            name
            for name in values
            if name not in METRICS and not name.startswith(tuple(METRIC_FAMILIES))
        ]
        assert not unknown, f"metrics {unknown} are not documented in METRICS"
        line = {"kind": kind, **position, **{name: _finite(v) for name, v in values.items()}}
        self._write("metrics.jsonl", json.dumps(line) + "\n", mode="a")
        for receive in self._followers:
            receive(line)

    def log_record(self, name: str, record: Mapping[str, Any]) -> None:
        """Append one JSON line to a file of the run.

        Raises:
            RunFolderError: it cannot be written.
        """
        self._write(name, json.dumps(record) + "\n", mode="a")

    def log_event(self, record: Mapping[str, Any]) -> None:
        """Append one JSON line to `events.jsonl`, which is on the disk when this returns.

        Raises:
            RunFolderError: it cannot be written.
        """
        self._write("events.jsonl", json.dumps(record) + "\n", mode="a", is_durable=True)

    def set_aside(self, *, after: int, attempt: int) -> None:
        """Copy the lines of rounds after `after` to `abandoned/attempt-K/`, file by file.

        Each file is written whole or not at all, so doing it again does no harm. `forget_after`
        takes the lines out of the run's own files, which then hold those that count alone.

        Raises:
            RunFolderError: they cannot be written.
        """
        aside = RunFolder(self.path / "abandoned" / f"attempt-{attempt}")
        for name in _BY_ROUND:
            lines = [line for line in read_lines(self.path, name) if line["round"] > after]
            if lines:
                aside.write_text(name, _text(lines))

    def forget_after(self, round_number: int, *, attempt: int = 0) -> None:
        """Drop lines of rounds after `round_number`, which a resumed run will write again.

        Events of earlier attempts stay, whatever their round.
        """
        for name in _BY_ROUND:
            kept = [line for line in read_lines(self.path, name) if line["round"] <= round_number]
            if (self.path / name).is_file():
                self.write_text(name, _text(kept))
        if (self.path / "events.jsonl").is_file():
            events = read_lines(self.path, "events.jsonl")
            past = [
                e for e in events if (e.get("attempt", 0), e["round"]) <= (attempt, round_number)
            ]
            self.write_text("events.jsonl", _text(past))

    def _write(self, name: str, text: str, *, mode: str, is_durable: bool = False) -> None:
        try:
            with (self.path / name).open(mode, encoding="utf-8") as file:
                file.write(text)
                if is_durable:
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise RunFolderError(
                f"{self.path / name} cannot be written: {error.strerror}; "
                "free space, then continue with --resume"
            ) from None


def fresh_folder(name: str) -> Path:
    """A run folder by name: runs/NAME, or the first free runs/NAME-2, runs/NAME-3 ..."""
    folder, number = Path("runs") / name, 2
    while folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        folder, number = Path("runs") / f"{name}-{number}", number + 1
    return folder


def read_lines(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of a run, in order; nothing if the file is absent.

    Raises:
        RunFolderError: the file cannot be read.
        DataError: a line is damaged; half a last line, which a killed run leaves, is not.
    """
    path = folder / name
    if not path.is_file():
        return
    try:
        # Damage inside a text stays visible as escapes instead of hiding the whole run.
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"line {number} of {path} is damaged ({error.msg}): {line[:60]!a}; remove the line"
            ) from None


def no_checkpoint(run: Path) -> str:
    """Why a run has no checkpoint to read, and what to do; to be asked only if it has none."""
    removed = run / WEIGHTS_REMOVED
    if removed.is_file():
        return f"run {run} has no weights any more: {removed.read_text(encoding='utf-8').strip()}"
    return f"run {run} has no checkpoint yet; wait for one"


def provenance() -> dict[str, str | None]:
    """What a result was made with: versions, and the commit if gmpo runs from a repository."""
    packages = ("gmpo", "torch", "transformers", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        **versions,
        "commit": _commit(),
        "python": platform.python_version(),
        "kernels": build().said,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def builds_of(runs: Iterable[Path]) -> tuple[dict[str, str | None], ...]:
    """The builds of gmpo that runs were begun with, each once, in order of first use.

    Each has "gmpo", the version, and "commit", None if it did not run from a repository. Folders
    without a `run.json`, in which nothing was trained, are left out.

    Raises:
        RunFolderError: a run's `run.json` cannot be read.
    """
    found: list[dict[str, str | None]] = []
    for path in (run / "run.json" for run in runs):
        if not path.is_file():
            continue
        try:
            made_with = json.loads(path.read_text(encoding="utf-8"))
            made_by = {"gmpo": made_with["gmpo"], "commit": made_with["commit"]}
        except (OSError, json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
            raise RunFolderError(
                f"{path} cannot be read ({type(error).__name__}: {error}); bring the file back: it "
                "says what the run was made with"
            ) from None
        if made_by not in found:
            found.append(made_by)
    return tuple(found)


def _commit() -> str | None:
    """The commit of the source tree this module lies in; None for an installed package."""
    git = shutil.which("git")
    root = Path(__file__).resolve().parents[2]
    if git is None or not (root / ".git").exists():
        return None
    reply = subprocess.run(
        [git, "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return reply.stdout.strip() or None


def _text(lines: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _finite(value: float) -> float | None:
    """JSON has no NaN: a figure that does not exist is null."""
    return value if math.isfinite(value) else None
