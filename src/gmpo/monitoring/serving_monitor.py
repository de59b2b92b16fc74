"""Answers of a gateway as streams, one a model version and variant, each judged by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gmpo.monitoring.anomalies import AnomalyState, Figure, judge_block
from gmpo.monitoring.answer_blocks import AnswerBlock
from gmpo.monitoring.severity import AnomalyReport, report_of

__all__ = ["PROCESS", "Baselines", "Judgement", "ServingMonitor", "StreamKey"]

Baselines = Mapping[str, Mapping[str, float]]
"""`center` and `scale` by detector."""

_IDLE_SECONDS = 1800.0
"""A stream without an answer for so long is over."""


@dataclass(frozen=True, kw_only=True)
class StreamKey:
    """What answers; None where no model was ever reached."""

    model_version: str | None
    variant: str | None


PROCESS = StreamKey(model_version=None, variant="process")
"""The gateway itself: its memory."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What was found out about one stream.

    Attributes:
        key: of the stream.
        report: what is out of the ordinary in it.
        is_news: whether the level changed, or one that is not "ok" is due to be told again.
        baselines: all that are fixed, where one was fixed just now; else None.
        is_over: whether the stream has ended.
    """

    key: StreamKey
    report: AnomalyReport
    is_news: bool
    baselines: Baselines | None = None
    is_over: bool = False


@dataclass
class _Stream:
    state: AnomalyState
    block: AnswerBlock
    last_answer: float
    report: AnomalyReport = field(default_factory=lambda: _quiet())


class ServingMonitor:
    """Judges answers block by block; reads no clock, writes nothing, used by one thread.

    A baseline belongs to a model version: another version begins with a warm-up of its own, or with
    what was found earlier for it.

    Args:
        baselines: found earlier, by stream.
    """

    def __init__(self, baselines: Mapping[StreamKey, Baselines] | None = None) -> None:
        self._known = {
            key: AnomalyState.from_baselines(found) for key, found in (baselines or {}).items()
        }
        self._streams: dict[StreamKey, _Stream] = {}
        self._memory = self._begun(PROCESS)

    def observe(
        self, payload: Mapping[str, Any], *, model_version: str | None, now: float
    ) -> Judgement | None:
        """Note an answer; the judgement of its block, if that is full now.

        An answer for which no model was reached belongs to the variant that should have given it,
        else to the stream that answered last: as one of its own it would be all failures.

        Args:
            payload: of the "answer" event (docs/store.md).
            model_version: that answered; None where none was reached.
            now: monotonic seconds.
        """
        variant = payload["served_variant"] or payload["assigned_variant"]
        key = StreamKey(model_version=model_version, variant=variant)
        if model_version is None:
            key = self._meant(variant) or key
        stream = self._streams.get(key)
        if stream is None:
            state = self._begun(key)
            stream = _Stream(state=state, block=AnswerBlock(began=now), last_answer=now)
            self._streams[key] = stream
        stream.last_answer = now
        stream.block.add(payload)
        if not stream.block.is_full(now):
            return None
        figures = stream.block.figures()
        stream.block = AnswerBlock(began=now)
        judgement, stream.state = self._judged(key, figures, stream.state)
        stream.report = judgement.report
        return judgement

    def look(self, *, memory_bytes: int, now: float) -> list[Judgement]:
        """Judge the process, tell again what lasts, and end what nobody asks any more.

        Args:
            memory_bytes: that the process holds.
            now: monotonic seconds, about a minute after the last look.
        """
        figures = {"log_memory": Figure(value=math.log(max(1, memory_bytes)), count=None)}
        judgement, self._memory = self._judged(PROCESS, figures, self._memory)
        found = [judgement]
        for key, stream in list(self._streams.items()):
            if now - stream.last_answer >= _IDLE_SECONDS:
                del self._streams[key]
                self._known[key] = stream.state.at_rest()
                was_told = stream.state.level != "ok"
                found.append(Judgement(key=key, report=_quiet(), is_news=was_told, is_over=True))
            elif stream.state.level != "ok":
                found.append(Judgement(key=key, report=stream.report, is_news=True))
        return found

    def _meant(self, variant: str | None) -> StreamKey | None:
        of_variant = [key for key in self._streams if key.variant == variant]
        return max(
            of_variant or list(self._streams),
            key=lambda key: self._streams[key].last_answer,
            default=None,
        )

    def _begun(self, key: StreamKey) -> AnomalyState:
        return self._known.get(key, AnomalyState())

    def _judged(
        self, key: StreamKey, figures: Mapping[str, Figure], before: AnomalyState
    ) -> tuple[Judgement, AnomalyState]:
        report, after = judge_block(figures, before)
        known = after.baselines()
        has_learned = known != before.baselines()
        # The process has no blocks: each look at it is one, and tells again what lasts.
        is_news = after.level != before.level or (key == PROCESS and after.level != "ok")
        judgement = Judgement(
            key=key,
            report=report,
            is_news=is_news,
            baselines=known if has_learned else None,
        )
        return judgement, after


def _quiet() -> AnomalyReport:
    return report_of({}, level="ok", actions={})
