"""What became of every completion of a suite's items, and its file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gmpo.errors import DataError, RunFolderError
from gmpo.grading import Verdict
from gmpo.records import Group, Prompt, Rollout
from gmpo.statistics import bootstrap_interval, pass_at_k, wilson_interval

__all__ = [
    "TASK_SUITE",
    "AskedWith",
    "CompletionOutcome",
    "ItemOutcome",
    "Mix",
    "SuiteOutcomes",
    "Way",
    "item_outcome",
    "prompt_digest",
    "refuse_other_question",
    "stored_outcomes",
    "told_of_answering",
    "what_chooses_items",
    "write_outcomes",
]

TASK_SUITE = "task"
"""Name of the suite that is a recipe's own task: its items come from the recipe."""

_SUFFIX = ".outcomes.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Way:
    """How items are asked: greedy once, or sampled several times.

    Each sampled completion is the one of `best_of` draws whose tokens have the largest geometric
    mean probability.
    """

    name: Literal["greedy", "sampled"]
    num_samples: int = 1
    temperature: float = 0.0
    best_of: int = 1

    @property
    def num_draws(self) -> int:
        """Completions drawn of an item."""
        return self.num_samples * self.best_of


@dataclass(frozen=True, kw_only=True)
class Mix:
    """A second model, and its weight in the geometric mean: 0 to 1; the first has the rest."""

    name: str
    weight: float = 0.5

    def __str__(self) -> str:
        """Both, for people."""
        return f"{self.weight:g} of {self.name}"


@dataclass(frozen=True, kw_only=True)
class AskedWith:
    """What a recipe adds to a suite's items, and how the model answers.

    Attributes:
        prompt_format: chat is the tokenizer's template, text the turns with line breaks.
        system: the recipe's system turn; None leaves it to the template.
        rollout: the recipe's own rollouts, "module:function"; None lets the model complete prompts.
        stop_strings: what ends a completion besides the model's end tokens.
        dtype: precision, as it was taken.
        mix: what the model's distribution was mixed with; None lets it answer alone.
    """

    prompt_format: Literal["chat", "text"]
    system: str | None
    rollout: str | None
    stop_strings: tuple[str, ...]
    dtype: str
    mix: Mix | None = None


@dataclass(frozen=True, kw_only=True)
class CompletionOutcome:
    """One completion: the grader's verdict, whether the token limit cut it, how long it was.

    `text` is kept on request only.
    """

    is_correct: bool
    status: Literal["graded", "timeout", "no_answer", "scorer_error"]
    answer: str | None
    is_truncated: bool
    num_tokens: int
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class ItemOutcome:
    """One item's completions. `digest` tells items of one id and different texts apart."""

    id: str
    digest: str
    completions: tuple[CompletionOutcome, ...]

    @property
    def num_correct(self) -> int:
        """Completions that were right."""
        return sum(completion.is_correct for completion in self.completions)

    def value(self, k: int) -> float:
        """Estimated probability that one of k completions is right."""
        return pass_at_k(num_correct=self.num_correct, num_samples=len(self.completions), k=k)


@dataclass(frozen=True, kw_only=True)
class SuiteOutcomes:
    """One model's outcomes on one suite, asked one way.

    Attributes:
        label: the model's name in tables.
        model: the model that was asked: a name or folder.
        suite: short name.
        title: as in tables.
        way: greedy or sampled.
        max_tokens: longest completion allowed.
        items: in the order asked.
        made_with: versions, commit and machine, as `gmpo.tracking.provenance` tells them when the
            model was asked; None in files of before it was kept.
        asked_with: what the recipe added; None, not known, in files of before it was kept.
    """

    label: str
    model: str
    suite: str
    title: str
    way: Way
    max_tokens: int
    items: tuple[ItemOutcome, ...]
    made_with: Mapping[str, str | None] | None = None
    asked_with: AskedWith | None = None

    def mean(self, k: int) -> float:
        """Mean over items of pass@k, as a fraction."""
        return sum(item.value(k) for item in self.items) / len(self.items)

    def interval(self, k: int) -> tuple[float, float]:
        """95 % interval of `mean`: Wilson's for one completion an item, else bootstrap by item.

        A bootstrap of items that are all alike has no width, so there Wilson's stands in, with
        items for trials: wider than it had to be, and not narrower.
        """
        values = [item.value(k) for item in self.items]
        if self.way.num_samples == 1 or len(set(values)) == 1:
            return wilson_interval(round(sum(values)), len(values))
        return bootstrap_interval(values)

    @property
    def num_completions(self) -> int:
        """Of all items."""
        return sum(len(item.completions) for item in self.items)

    def count(self, status: str) -> int:
        """Completions of this status, or that were "truncated"."""
        return sum(
            completion.is_truncated if status == "truncated" else completion.status == status
            for item in self.items
            for completion in item.completions
        )

    def counts(self) -> dict[str, int]:
        """What a score alone does not show."""
        return {
            "items": len(self.items),
            "completions": self.num_completions,
            "truncated": self.count("truncated"),
            "no_answer": self.count("no_answer"),
            "timeouts": self.count("timeout"),
            "scorer_errors": self.count("scorer_error"),
        }


def item_outcome(group: Group, verdicts: Sequence[Verdict], *, keep_texts: bool) -> ItemOutcome:
    """What is kept of an item's completions."""
    pairs = zip(group.rollouts, verdicts, strict=True)
    return ItemOutcome(
        id=group.prompt.id,
        digest=prompt_digest(group.prompt),
        completions=tuple(_completion(*pair, keep_texts=keep_texts) for pair in pairs),
    )


def write_outcomes(folder: Path, outcomes: SuiteOutcomes, *, place: int) -> Path:
    """Write FOLDER/SUITE.WAY.outcomes.json; `stored_outcomes` reads it again.

    Args:
        folder: created if it is absent.
        outcomes: of one suite.
        place: among the files of one evaluation, whose first model is the baseline.

    Raises:
        RunFolderError: the file cannot be written.
    """
    path = folder / f"{outcomes.suite}.{outcomes.way.name}{_SUFFIX}"
    record = {"format": _FORMAT, "place": place, **asdict(outcomes)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")
    except OSError as error:
        raise RunFolderError(
            f"outcomes cannot be written to {path}: {error.strerror}; free space or permissions"
        ) from None
    return path


def stored_outcomes(folder: Path) -> list[SuiteOutcomes]:
    """All outcomes in a folder and in the folders directly in it, as placed; empty without any.

    Raises:
        DataError: a file of outcomes is damaged or of another version.
    """
    paths = sorted([*folder.glob(f"*{_SUFFIX}"), *folder.glob(f"*/*{_SUFFIX}")])
    placed = sorted(map(_read, paths), key=lambda found: found[0])
    return [outcomes for _, outcomes in placed]


def _read(path: Path) -> tuple[int, SuiteOutcomes]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = record.pop("format")
        if found != _FORMAT:
            raise DataError(
                f"{path} has format {found}, this version reads {_FORMAT}; evaluate anew"
            )
        place: int = record.pop("place")
        items = tuple(_item(item) for item in record.pop("items"))
        if not items:
            raise DataError(f"{path} holds no item; remove it or evaluate anew")
        way, asked_with = Way(**record.pop("way")), _asked_with(record.pop("asked_with", None))
        return place, SuiteOutcomes(way=way, items=items, asked_with=asked_with, **record)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no whole file of outcomes ({type(error).__name__}: {error}); remove it or "
            "evaluate anew"
        ) from None


def _asked_with(record: dict[str, Any] | None) -> AskedWith | None:
    if record is None:
        return None
    mix = record.pop("mix", None)  # files of before it was kept have none
    return AskedWith(
        stop_strings=tuple(record.pop("stop_strings")),
        mix=None if mix is None else Mix(**mix),
        **record,
    )


def _item(record: dict[str, Any]) -> ItemOutcome:
    completions = tuple(CompletionOutcome(**one) for one in record.pop("completions"))
    return ItemOutcome(completions=completions, **record)


def _completion(rollout: Rollout, verdict: Verdict, *, keep_texts: bool) -> CompletionOutcome:
    return CompletionOutcome(
        is_correct=verdict.is_correct,
        status=verdict.status,
        answer=verdict.answer,
        is_truncated=rollout.is_truncated,
        num_tokens=rollout.num_tokens,
        text=rollout.text if keep_texts else None,
    )


def prompt_digest(prompt: Prompt) -> str:
    """Of the question and the answer; the instruction and few-shot examples are part of it."""
    turns = [message.content for message in prompt.messages or ()] or [prompt.text or ""]
    answer = prompt.columns.get("answers") or prompt.columns.get("answer")
    text = re.sub(r"\s+", " ", "\n".join([*turns, str(answer)]))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def refuse_other_question(one: SuiteOutcomes, other: SuiteOutcomes) -> None:
    """Refuse to compare outcomes of a suite whose items were put in other words or another form.

    Where it is not known of one of them how it was asked, nothing is refused: `told_of_answering`
    says so.

    Raises:
        DataError: their prompt formats or system turns differ.
    """
    if one.asked_with is None or other.asked_with is None:
        return
    for field, what, key in (
        ("prompt_format", "prompt format", "model.prompt_format"),
        ("system", "system turn", "model.system"),
    ):
        left, right = (asdict(asked)[field] for asked in (one.asked_with, other.asked_with))
        if left != right:
            raise DataError(
                f"{one.suite} was put differently to {one.label!r} and {other.label!r}: the "
                f"{what} was {_told(left)} and {_told(right)}; ask both alike, with --set {key}=..."
            )


def told_of_answering(one: SuiteOutcomes, other: SuiteOutcomes) -> Iterator[str]:
    """What differs in how two models answered the same items, or is not known, a sentence each."""
    for outcomes in (one, other):
        if outcomes.asked_with is None:
            yield (
                f"{one.title}: how {outcomes.label} was asked is not known (prompt format, system "
                "turn, rollouts, stop strings, precision): its outcomes are of before it was kept"
            )
    if one.asked_with is None or other.asked_with is None:
        return
    for what, left, right in (
        ("rollouts", one.asked_with.rollout, other.asked_with.rollout),
        ("stop strings", one.asked_with.stop_strings, other.asked_with.stop_strings),
        ("precision", one.asked_with.dtype, other.asked_with.dtype),
        ("mixture with", one.asked_with.mix, other.asked_with.mix),
    ):
        if left != right:
            told = f"{_told(left)} for {one.label} and {_told(right)} for {other.label}"
            yield f"{one.title}: {what} {told}"


def _told(value: str | tuple[str, ...] | Mix | None) -> str:
    if isinstance(value, tuple):
        return " ".join(map(repr, value)) or "none"
    if isinstance(value, Mix):
        return str(value)
    return "none" if value is None else repr(value)


def what_chooses_items(suite: str) -> str:
    """The options that have to be alike for two models to be asked the same items of a suite."""
    if suite == TASK_SUITE:
        return "one recipe, the same --items and the same task.* keys of --set"
    return "the same --items and --data"
