"""The gateway's answers watched for anomalies, which go to `/metrics` and into the store."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from gmpo.host_memory import resident_bytes
from gmpo.monitoring.serving_monitor import Baselines, Judgement, ServingMonitor, StreamKey
from gmpo.serving.answer_record import AnswerRecord
from gmpo.serving.figures import GatewayFigures
from gmpo.store import Event, Store

__all__ = ["AnomalyWatch", "stored_baselines"]

_LOOK_SECONDS = 60.0


class AnomalyWatch:
    """Judges every answer's block and tells what it found; all on the event loop.

    Writes an "anomaly" event when a level changes and each minute while it is not "ok", so that
    readers can tell what lasts from what was left by a gateway that ended; and a "baseline" event
    when it has learned what is usual.

    Args:
        figures: exposes what was found, and labels versions.
        put: takes events for the store; None where there is none.
        baselines: learned earlier, by stream.
    """

    def __init__(
        self,
        figures: GatewayFigures,
        *,
        put: Callable[[Event], None] | None = None,
        baselines: Mapping[StreamKey, Baselines] | None = None,
    ) -> None:
        self._figures = figures
        self._put = put
        self._monitor = ServingMonitor(baselines)
        self._gateway = uuid.uuid4().hex[:12]

    def observe(self, record: AnswerRecord) -> None:
        """Note an answer that is over."""
        version = self._figures.versions.label(record.report.answering_version)
        judgement = self._monitor.observe(
            record.payload(), model_version=version, now=time.monotonic()
        )
        if judgement is not None:
            self._tell(judgement)

    async def run(self) -> None:
        """Look each minute at what answers alone do not show, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            self.look()

    def look(self) -> None:
        """Judge the process's memory, tell again what lasts, end what nobody asks any more."""
        for judgement in self._monitor.look(memory_bytes=resident_bytes(), now=time.monotonic()):
            self._tell(judgement)

    def _tell(self, judgement: Judgement) -> None:
        self._figures.judged(judgement)
        if judgement.is_news:
            self._write("anomaly", judgement, judgement.report.payload())
        if judgement.baselines is not None:
            self._write("baseline", judgement, {"detectors": dict(judgement.baselines)})

    def _write(self, kind: str, judgement: Judgement, payload: Mapping[str, Any]) -> None:
        if self._put is None:
            return
        of_whom = {"variant": judgement.key.variant, "gateway": self._gateway}
        self._put(
            Event(
                kind=kind,
                time=time.time(),
                payload={**payload, **of_whom},
                model_version=judgement.key.model_version,
            )
        )


def stored_baselines(store: Store) -> dict[StreamKey, Baselines]:
    """What gateways have learned to be usual, the newest of each stream.

    The process's own is left out: memory depends on the machine and on how it is started.

    Raises:
        StoreError: the store cannot be read.
    """
    found: dict[StreamKey, Baselines] = {}
    for event in store.events(kinds=["baseline"]):
        if event.model_version is not None:
            key = StreamKey(model_version=event.model_version, variant=event.payload["variant"])
            found[key] = event.payload["detectors"]
    return found
