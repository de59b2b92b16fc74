"""Figures of the gateway itself, for `/health` and `/metrics`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from gmpo.monitoring.anomaly_metrics import AnomalyMetrics
from gmpo.monitoring.serving_metrics import ServingMetrics
from gmpo.monitoring.serving_monitor import Judgement
from gmpo.monitoring.version_labels import VersionLabels
from gmpo.serving.admission import Admission
from gmpo.serving.answer_record import AnswerRecord
from gmpo.serving.entrance import Entrance

__all__ = ["GatewayFigures"]


class GatewayFigures(Collector):
    """Counts of one gateway.

    Args:
        registry: where they are exposed, with whatever else is in it; None makes one.
        events: counts of the events written and lost, by what became of them.
    """

    media_type = CONTENT_TYPE_LATEST

    def __init__(
        self,
        *,
        registry: CollectorRegistry | None = None,
        events: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self.created = int(time.time())
        self._registry = registry or CollectorRegistry()
        self._events = events
        self._tokens: Counter[str] = Counter()
        self.versions = VersionLabels()
        """Labels of the versions that answered."""
        self._admission: Admission | None = None
        self._entrance: Entrance | None = None
        self._routing: Callable[[], Mapping[str, int]] = dict
        self._breakers: Callable[[], Mapping[str, str]] = dict
        self._experiment: Callable[[], Mapping[str, object] | None] = lambda: None
        self._following: Callable[[], Sequence[Mapping[str, object]]] = list
        self._registry.register(self)
        self._answers = ServingMetrics(self._registry)
        self._anomalies = AnomalyMetrics(self._registry)

    def watch(self, admission: Admission, entrance: Entrance) -> None:
        """Tell of these."""
        self._admission, self._entrance = admission, entrance

    def watch_routing(
        self,
        counts: Callable[[], Mapping[str, int]],
        breakers: Callable[[], Mapping[str, str]],
        experiment: Callable[[], Mapping[str, object] | None] = lambda: None,
        following: Callable[[], Sequence[Mapping[str, object]]] = list,
    ) -> None:
        """Tell of these.

        Args:
            counts: what happened on the way to a backend, by name.
            breakers: phase of each backend's breaker, by the backend's name.
            experiment: how the one that splits the traffic stands; None where none does.
            following: of each champion that is followed, the version wanted and the one served.
        """
        self._routing, self._breakers = counts, breakers
        self._experiment, self._following = experiment, following

    def observe(self, record: AnswerRecord) -> None:
        """Count an answer that is over."""
        version = self.versions.counted(record.report.answering_version)
        self._answers.answered(record.payload(), model_version=version)
        if record.usage is not None:
            self._tokens["prompt"] += record.usage.prompt_tokens
            self._tokens["completion"] += record.usage.completion_tokens

    def judged(self, judgement: Judgement) -> None:
        """Tell what was found out about answers."""
        self._anomalies.judged(judgement)

    def exposition(self) -> bytes:
        """All figures of the registry in Prometheus' text format."""
        return generate_latest(self._registry)

    def as_dict(self) -> dict[str, object]:
        """Those that tell how the gateway fares."""
        return {
            **self.gauges(),
            "turned_away": {} if self._entrance is None else dict(self._entrance.turned_away),
            "events": dict(self._events()),
            "routing": dict(self._routing()),
            "breakers": dict(self._breakers()),
            "experiment": self._experiment(),
            "following": [dict(one) for one in self._following()],
            "folded_versions": self.versions.num_folded,
            "forgotten_addresses": (
                0 if self._entrance is None else self._entrance.wrong_keys.num_forgotten
            ),
        }

    def collect(self) -> Iterator[Metric]:
        """Figures for Prometheus."""
        requests = CounterMetricFamily(
            "gmpo_gateway_responses", "Responses begun", labels=("route", "status")
        )
        turned_away = CounterMetricFamily(
            "gmpo_gateway_turned_away", "Requests turned away at the entrance", labels=("reason",)
        )
        if self._entrance is not None:
            for (route, status), count in list(self._entrance.statuses.items()):
                requests.add_metric((route, str(status)), count)
            for reason, count in list(self._entrance.turned_away.items()):
                turned_away.add_metric((reason,), count)
        tokens = CounterMetricFamily(
            "gmpo_gateway_tokens", "Tokens read and given", labels=("kind",)
        )
        for kind, count in list(self._tokens.items()):
            tokens.add_metric((kind,), count)
        events = CounterMetricFamily(
            "gmpo_gateway_events", "Events for the store, by what became of them", labels=("fate",)
        )
        counts = dict(self._events())
        waiting = counts.pop("waiting", 0)
        for fate, count in counts.items():
            events.add_metric((fate,), count)
        routing = CounterMetricFamily(
            "gmpo_gateway_routing", "What happened on the way to a backend", labels=("event",)
        )
        for name, count in self._routing().items():
            routing.add_metric((name,), count)
        yield from (requests, turned_away, tokens, events, routing)
        yield self._open_breakers()
        yield CounterMetricFamily(
            "gmpo_gateway_folded_versions",
            'Answers whose model version is exposed as "other", because there are too many',
            value=self.versions.num_folded,
        )
        for name, value in {**self.gauges(), "waiting_events": waiting}.items():
            yield GaugeMetricFamily(
                f"gmpo_gateway_{name}", f"{name.replace('_', ' ').capitalize()} now", value=value
            )

    def _open_breakers(self) -> Metric:
        family = GaugeMetricFamily(
            "gmpo_gateway_breaker_open",
            "1 while a backend is left alone, 0.5 while it is tried again, else 0",
            labels=("backend",),
        )
        for name, phase in self._breakers().items():
            family.add_metric((name,), {"open": 1.0, "half_open": 0.5}.get(phase, 0.0))
        return family

    def gauges(self) -> dict[str, int]:
        """How much is going on."""
        admission, entrance = self._admission, self._entrance
        return {
            "running_completions": 0 if admission is None else admission.num_running,
            "queued_requests": 0 if admission is None else admission.num_queued,
            "active_requests": 0 if entrance is None else entrance.num_active,
        }
