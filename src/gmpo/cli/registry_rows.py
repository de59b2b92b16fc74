"""What `gmpo registry` reads and prints: rows of versions and cycles, lineage, evidence, times."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmpo.cli.conventions import model_name
from gmpo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from gmpo.store import Cycle, ModelVersion, Store

__all__ = [
    "clock",
    "cycle_row",
    "found_folder",
    "lineage_of",
    "metric_of",
    "read_evidence",
    "version_row",
    "why_serving",
]


def cycle_row(cycle: Cycle) -> dict[str, Any]:
    """A learning cycle: its outcome or next step, and what decided it or was found last."""
    result, reports = cycle.payload.get("result") or {}, cycle.payload.get("reports") or {}
    step = result.get("step") or next(reversed(reports), None)
    sentence = result.get("sentence") or (reports[step]["sentence"] if step in reports else None)
    return {
        "cycle": cycle.number,
        "state": cycle.state,
        "began": cycle.created,
        "ended": cycle.ended,
        "reason": result.get("reason"),
        "step": step,
        "sentence": sentence,
        "new_model_version": result.get("new_model_version"),
    }


def version_row(opened: Store, version: ModelVersion) -> dict[str, Any]:
    """A version with its role: whether it serves, served, or waits for a person."""
    from gmpo.registry import Registry, serving_line

    history = opened.champion_history(version.name)
    line = serving_line(history)
    waiting = Registry(opened, Path("models")).candidates(version.name)
    role = ""
    if version.version in [champion.version for champion in history]:
        role = "taken back"  # unless it passed again, or is in the line that serves
    if version.version in [candidate.version for candidate in waiting]:
        role = "candidate"
    if version.version in line:
        role = "served before"
    if line[-2:-1] == [version.version]:
        role = "predecessor"
    if line[-1:] == [version.version]:
        role = "champion"
    lineage = {key: value for key, value in version.lineage.items() if key != "files"}
    return {**vars(version), "lineage": lineage, "role": role}


def found_folder(model: str) -> Path:
    """A run's newest checkpoint's model, a folder, or the files of a model by name.

    Raises:
        ConfigError: the run has no checkpoint yet.
        ModelError: the model is not there.
    """
    folder = Path(model_name(model))
    if folder.is_dir():
        return folder
    from gmpo.policy.load import model_folder

    return Path(model_folder(model))


def lineage_of(model: str) -> dict[str, Any]:
    """Where a run's model comes from.

    Raises:
        DataError: the run's recipe cannot be read.
    """
    recipe = Path(model) / "recipe.toml"
    if not recipe.is_file():
        return {"source": str(Path(model).resolve()) if Path(model).exists() else model}
    try:
        table = tomllib.loads(recipe.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{recipe} cannot be read: {error}; restore it") from None
    checkpoint = Path(model_name(model)).parent.name
    return {"run": str(Path(model).resolve()), "checkpoint": checkpoint, "recipe": table}


def metric_of(word: str) -> tuple[str, float]:
    """The name and number of a `--metric`.

    Raises:
        ConfigError: it is of another form.
    """
    name, _, value = word.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ConfigError(f"--metric is {word!r}; write NAME=NUMBER") from None


def read_evidence(path: Path) -> Mapping[str, Any]:
    """A decision in a file, as `gmpo gate --json` prints it.

    Raises:
        DataError: the file cannot be read or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"--evidence {path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"--evidence {path} is no JSON object; give what gmpo gate --json printed")
    return found


def why_serving(reason: Mapping[str, Any]) -> str:
    """Why a version became the champion, in one line."""
    kind = reason.get("kind", "set")
    if kind == "promotion":
        return f"promoted by {reason.get('by')}: {reason['evidence'].get('sentence')}"
    return f"{kind}: {reason.get('why', 'no reason given')}"


def clock(seconds: float) -> str:
    """Unix seconds as a date and time, UTC."""
    return datetime.fromtimestamp(seconds, tz=UTC).strftime("%Y-%m-%d %H:%M")
