"""Events and runs as rows of text for the page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from gmpo.run_tables import visible
from gmpo.store import Event

__all__ = ["anomaly_words", "event_rows", "moment", "plain", "reason_words", "seconds_words"]

_LONGEST = 160
_MIB, _GIB = 2**20, 2**30
_USUAL: Mapping[str, object] = {"fell_back": False, "comment_length": 0}
"""Fields of judgements that are told only where they have another value."""


def moment(time: float) -> str:
    """Unix seconds as UTC text, to the second."""
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S")


def seconds_words(seconds: float) -> str:
    """Milliseconds below one second, else seconds."""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def plain(text: str) -> str:
    """The text with everything escaped that Markdown would take for markup."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]()<>#+-.!|~$:" else c for c in visible(text))


def event_rows(events: Sequence[Event]) -> list[dict[str, str]]:
    """One row an event: when, what kind, of which model, and what it says.

    Texts that people wrote or were given are never shown: of kinds that are not known here only the
    names of the fields are.
    """
    return [
        {
            "time (UTC)": moment(event.time),
            "kind": event.kind,
            "model version": event.model_version or "",
            "what": _cut(visible(_WORDS.get(event.kind, _fields)(event.payload))),
        }
        for event in events
    ]


def reason_words(reason: Mapping[str, Any]) -> str:
    """Why a version became champion: who did it and the gate's sentence, or all that is known."""
    kind, by = reason.get("kind"), reason.get("by")
    evidence = reason.get("evidence")
    sentence = evidence.get("sentence") if isinstance(evidence, Mapping) else reason.get("why")
    if kind is None or not sentence:
        return json.dumps(reason, ensure_ascii=False)
    return f"{kind} by {by}: {sentence}" if by else f"{kind}: {sentence}"


def _answer(payload: Mapping[str, Any]) -> str:
    latency, tokens, quality = (
        payload.get(name) for name in ("latency_s", "completion_tokens", "quality")
    )
    parts = [
        f"{payload.get('status')}",
        payload.get("finish_reason"),
        seconds_words(latency) if isinstance(latency, int | float) else None,
        None if tokens is None else f"{tokens} tokens",
        f"quality {quality:.2f}" if isinstance(quality, int | float) else None,
        f"fell back: {payload.get('fallback_reason')}" if payload.get("fell_back") else None,
        payload.get("error"),
    ]
    return ", ".join(str(part) for part in parts if part)


def _judged(payload: Mapping[str, Any]) -> str:
    """Only what is known and tells something, figures short: a line of the log has little room."""
    told = {name: value for name, value in payload.items() if value is not None}
    if told.get("served_variant") == told.get("variant"):
        told.pop("served_variant", None)
    for name, usual in _USUAL.items():
        if told.get(name) == usual:
            del told[name]
    return ", ".join(_figure(name, value) for name, value in told.items())


def _figure(name: str, value: object) -> str:
    if name.endswith("_bytes") and isinstance(value, int | float):
        name, value = name.removesuffix("_bytes"), _bytes_words(value)
    return f"{name.removesuffix('_s').replace('_', ' ')} {_short(value)}"


def _bytes_words(count: float) -> str:
    """MiB below one GiB, else GiB."""
    return f"{count / _MIB:.0f} MiB" if count < _GIB else f"{count / _GIB:.2f} GiB"


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def anomaly_words(payload: Mapping[str, Any]) -> str:
    """The signs of an anomaly report, by family, each with how strong it is."""
    return "; ".join(
        f"{family}: " + ", ".join(f"{name} {_short(score)}" for name, score in scores.items())
        for family, scores in (payload.get("families") or {}).items()
        if scores
    )


def _anomaly(payload: Mapping[str, Any]) -> str:
    actions = "; ".join(map(str, payload.get("recommended_actions") or []))
    parts = (
        f"{payload.get('level')}, severity {_short(payload.get('severity'))}",
        anomaly_words(payload),
        actions,
    )
    return "; ".join(part for part in parts if part)


def _alert(payload: Mapping[str, Any]) -> str:
    labels, annotations = payload.get("labels") or {}, payload.get("annotations") or {}
    return f"{payload.get('status')} {labels.get('alertname')}: {annotations.get('summary')}"


def _swap(payload: Mapping[str, Any]) -> str:
    return f"{payload.get('version')} serves in place of {payload.get('previous')}"


def _gate(payload: Mapping[str, Any]) -> str:
    return f"{payload.get('outcome')}: {payload.get('sentence')}"


def _champion(payload: Mapping[str, Any]) -> str:
    before = payload.get("previous")
    instead = f" in place of {before}" if before else ""
    reason = payload.get("reason")
    why = reason_words(reason) if isinstance(reason, Mapping) else "no reason is told"
    return f"champion of {payload.get('name')}{instead}; {why}"


def _decision(payload: Mapping[str, Any]) -> str:
    return str(payload.get("recommendation") or _json(payload))


def _fields(payload: Mapping[str, Any]) -> str:
    return f"with {', '.join(payload)}" if payload else ""


def _json(payload: Mapping[str, Any]) -> str:
    known = {name: value for name, value in payload.items() if value is not None}
    return json.dumps(known, ensure_ascii=False)


_WORDS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "answer": _answer,
    "outcome": _judged,
    "feedback": _judged,
    "exposure": _judged,
    "shadow": _judged,
    "metric": _judged,
    "swap": _swap,
    "decision": _decision,
    "anomaly": _anomaly,
    "alert": _alert,
    "promotion": _champion,
    "rollback": _champion,
    "gate": _gate,
    "removed": _json,
}


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
