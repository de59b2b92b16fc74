"""`POST /v1/feedback`: what people think of an answer, kept beside its record."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gmpo.errors import StoreError
from gmpo.serving.answer_record import AnswerRecord
from gmpo.serving.faults import ApiError
from gmpo.store import Event, Store

__all__ = ["FeedbackBody", "FeedbackDesk"]

_REMEMBERED = 10_000
_LIKED = 0.5


class FeedbackBody(BaseModel):
    """Of `/v1/feedback`; exactly one of `score` and `thumbs`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    request_id: Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00]*$")]
    """The answer's `id`, or `gmpo.request_id` of one of several prompts."""
    score: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    """From 0 to 1; from 0.5 on the answer counts as a success."""
    thumbs: Literal["up", "down"] | None = None
    """1 or 0."""
    comment: Annotated[str, Field(max_length=10_000)] | None = None
    """Only its length is kept."""

    @model_validator(mode="after")
    def _one_opinion(self) -> FeedbackBody:
        if (self.score is None) == (self.thumbs is None):
            what = "neither score nor thumbs is" if self.score is None else "both are"
            raise ValueError(
                f"{what} given; give either score or thumbs: score is a number from 0 to 1, thumbs "
                "is 'up' or 'down'"
            )
        return self

    @property
    def value(self) -> float:
        """The score, from 0 to 1."""
        return float(self.thumbs == "up") if self.score is None else self.score


@dataclass(frozen=True, kw_only=True)
class _Answered:
    experiment: str | None
    variant: str | None
    unit: str | None
    session: str | None
    model_version: str | None


class FeedbackDesk:
    """Takes feedback on answers that this gateway gave, or that are in the store.

    The latest answers are remembered, because the store may be behind or locked.

    Args:
        store: with the "answer" events of earlier ones.
        put: takes events without waiting.
    """

    def __init__(self, store: Store, put: Callable[[Event], None]) -> None:
        self._store = store
        self._put = put
        self._latest: OrderedDict[str, _Answered] = OrderedDict()

    def observe(self, record: AnswerRecord) -> None:
        """Remember an answer that is over."""
        self._latest[record.request.id] = _Answered(
            experiment=record.report.experiment,
            variant=record.report.assigned_variant,
            unit=record.request.unit or None,
            session=record.request.session,
            model_version=record.report.model_version,
        )
        if len(self._latest) > _REMEMBERED:
            self._latest.popitem(last=False)

    async def take(self, body: FeedbackBody) -> None:
        """Record a "feedback" event, and the "outcome" where the answer is part of an experiment.

        Raises:
            ApiError: 404, there is no such answer; 503, it may be in the store, which cannot be
                read now.
        """
        answered = self._latest.get(body.request_id)
        if answered is None:
            answered = await asyncio.to_thread(self._look_up, body.request_id)
        of: dict[str, Any] = {
            "time": time.time(),
            "model_version": answered.model_version,
            "experiment": answered.experiment,
            "unit": answered.unit,
            "request_id": body.request_id,
        }
        opinion = {} if body.thumbs is None else {"thumbs": body.thumbs}
        length = 0 if body.comment is None else len(body.comment)
        told = {"score": body.value, **opinion, "comment_length": length}
        self._put(Event(kind="feedback", payload=told, **of))
        if answered.experiment is not None and answered.unit is not None:
            outcome = {
                "variant": answered.variant,
                "success": int(body.value >= _LIKED),
                "judged_by": "feedback",
                "quality": None,
                "latency_s": None,
                "session": answered.session,
            }
            self._put(Event(kind="outcome", payload=outcome, **of))

    def _look_up(self, request_id: str) -> _Answered:
        try:
            found = self._store.events(kinds=["answer"], request_id=request_id, limit=1)
        except StoreError as error:
            raise ApiError(
                503,
                f"whether there is such an answer cannot be looked up now: {error}",
                code="store_unavailable",
                retry_after_seconds=5.0,
            ) from None
        if not found:
            raise ApiError(
                404,
                f"there is no answer {ascii(request_id)[:80]} on record; give the id of a "
                "response, or of one with several prompts a request_id in its gmpo",
                param="request_id",
                code="unknown_request",
            )
        (event,) = found
        return _Answered(
            experiment=event.experiment,
            variant=event.payload.get("assigned_variant"),
            unit=event.unit,
            session=event.payload.get("session"),
            model_version=event.model_version,
        )
