"""reasoning-gym in a worker process: its items, and its scorers' opinion of an answer.

Its scorers are lenient in ways that a policy learns to use: part of a point for text that holds
the answer somewhere, a floor for any text at all. So a scorer sees the extracted answer alone, and
only exactly 1.0 is right. Items are made in the same kind of process, with a fixed hash seed,
because some depend on the order of sets.
"""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from gmpo.errors import DataError
from gmpo.grading.answers import extract_answer, marked_answer
from gmpo.grading.worker import STARTUP_LIMIT_SECONDS, Worker, serve

__all__ = ["GymItem", "GymProcess", "GymScore", "GymSpec", "gym_answer", "main"]

_NONSENSE = "?"  # no task has it for an answer


@dataclass(frozen=True, kw_only=True)
class GymSpec:
    """One of reasoning-gym's data sets: `size` items, each determined by seed and index."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int
    size: int

    def as_text(self) -> str:
        """JSON that is the same for the same data set."""
        return json.dumps(vars(self), sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class GymItem:
    """One item, and what its scorer thinks of the best and of a meaningless completion.

    `entry` is the library's own record, packed; only the process looks inside.
    """

    question: str
    answer: str | None
    entry: str
    reference_score: float | None
    nonsense_score: float | None


@dataclass(frozen=True, kw_only=True)
class GymScore:
    """A scorer's value, or the error that it raised instead."""

    value: float | None
    error: str | None


class GymProcess:
    """reasoning-gym's process, started when first asked and replaced when it had to be killed."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._opened: set[str] = set()
        self._was_started = False
        self.num_restarts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process, if there is one."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def item(self, spec: GymSpec, index: int) -> GymItem:
        """The item of that index.

        Raises:
            DataError: there is no such data set, it does not take these options, or it fails to
                make the item.
        """
        request = {"spec": spec.as_text(), "index": index}
        reply = self._open(spec).ask(request, STARTUP_LIMIT_SECONDS)
        if reply is None or "error" in reply:
            why = f"took over {STARTUP_LIMIT_SECONDS:g} s" if reply is None else reply["error"]
            raise DataError(
                f"reasoning-gym's {spec.name!r} does not make item {index} ({why}); change "
                "task.options, or take another task"
            )
        return GymItem(**reply)

    def score(
        self, spec: GymSpec, entry: str, answer: str, *, limit_seconds: float
    ) -> GymScore | None:
        """What the data set's scorer says of an answer; None if it did not end in time."""
        request = {"spec": spec.as_text(), "entry": entry, "answer": answer}
        reply = self._open(spec).ask(request, limit_seconds)
        return None if reply is None else GymScore(**reply)

    def _open(self, spec: GymSpec) -> Worker:
        """The process, with the data set made in it, which is no part of a scorer's time."""
        if self._worker is None or not self._worker.is_alive:
            self.num_restarts += self._was_started
            self.close()
            self._worker, self._opened = Worker("gym"), set()
            self._was_started = True
        key = spec.as_text()
        if key not in self._opened:
            reply = self._worker.ask({"spec": key}, STARTUP_LIMIT_SECONDS)
            if reply is None or "error" in reply:
                why = f"took over {STARTUP_LIMIT_SECONDS:g} s" if reply is None else reply["error"]
                raise DataError(f"reasoning-gym's {spec.name!r} cannot be made: {why}")
            self._opened.add(key)
        return self._worker


def gym_answer(text: str, reference: str) -> str | None:
    """The answer in a completion, in the form of the reference, or None if there is none.

    What the completion marks as its answer; else the last number where the reference is nothing
    but a number, the whole text where it has several lines, and the last line otherwise.
    """
    if "\n" in reference.strip() and marked_answer(text) is None:
        return text.strip() or None
    wants_number = extract_answer(reference) == reference.strip()
    return extract_answer(text, wants_number=wants_number)


def main() -> None:
    """Serve `{"spec"}`, with `index` for an item, with `entry` and `answer` for a score."""
    import reasoning_gym  # noqa: F401  (its import is no part of a request's time)

    datasets: dict[str, Any] = {}

    def reply(request: dict[str, Any]) -> dict[str, Any]:
        if request["spec"] not in datasets:
            made, error = _attempt(_make_dataset, json.loads(request["spec"]))
            if error is not None:
                return {"error": error}
            datasets[request["spec"]] = made
        dataset = datasets[request["spec"]]
        if "index" in request:
            item, error = _attempt(_make_item, dataset, request["index"])
            return item if error is None else {"error": error}
        if "entry" in request:
            # The process packed it itself; nothing else writes to its input.
            entry = pickle.loads(base64.b64decode(request["entry"]))
            return vars(_score(dataset, request["answer"], entry))
        return {}

    serve(reply)


def _make_dataset(spec: Mapping[str, Any]) -> Any:
    import dataclasses
    import difflib

    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import DATASETS, create_dataset

    name, options = spec["name"], dict(spec["options"])
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {sorted(DATASETS)}"
        raise LookupError(f"there is no such task; {hint}")
    allowed = {f.name for f in dataclasses.fields(DATASETS[name][1])} - {"seed", "size"}
    for option in options:
        if option not in allowed:
            raise LookupError(f"it has no option {option!r}; allowed: {sorted(allowed)}")
    if name == "composite":
        options["datasets"] = [DatasetSpec(**part) for part in options.get("datasets", ())]
    return create_dataset(name, **options, seed=spec["seed"], size=spec["size"])


def _make_item(dataset: Any, index: int) -> dict[str, Any]:
    entry = dataset[index]
    answer = entry["answer"]
    item = {
        "question": entry["question"],
        "answer": answer if isinstance(answer, str) and answer.strip() else None,
        "entry": base64.b64encode(pickle.dumps(entry)).decode(),
        "reference_score": None,
        "nonsense_score": _score(dataset, _NONSENSE, entry).value,
    }
    if item["answer"] is not None:
        best = gym_answer(f"<answer>{answer}</answer>", answer)
        item["reference_score"] = _score(dataset, best, entry).value
    return item


def _score(dataset: Any, answer: str | None, entry: Any) -> GymScore:
    value, error = _attempt(dataset.score_answer, answer, entry)
    return GymScore(value=None if error else float(value), error=error)


def _attempt(function: Any, *arguments: Any) -> tuple[Any, str | None]:
    """A library function's value, or the name and text of whatever it raised."""
    try:
        return function(*arguments), None
    except Exception as error:  # noqa: BLE001  (it may raise anything; named and counted)
        return None, f"{type(error).__name__}: {str(error)[:3000]}"
