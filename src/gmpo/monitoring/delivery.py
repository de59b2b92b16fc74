"""How alerts reach people: Alertmanager, any receiver of its webhooks, or apprise's services.

Whoever sends never waits: each receiver has a thread and a queue of its own. What a receiver does
not take is tried again, and what is given up is counted by the reason.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import httpx2

from gmpo.errors import ConfigError, DeliveryError, DependencyError
from gmpo.monitoring.alerts import Notification, fingerprint
from gmpo.shown_urls import shown_url, without_url

__all__ = [
    "Delivery",
    "Sink",
    "alertmanager_alerts",
    "alertmanager_sink",
    "apprise_sink",
    "webhook_message",
    "webhook_sink",
]

Sink = Callable[[Sequence[Notification]], None]
"""Delivers notifications of one `alertname`, or raises `DeliveryError`."""

_LONGEST_PAUSE_SECONDS = 60.0
_ADDRESS = "give an address such as http://127.0.0.1:9093"
_NEVER = "0001-01-01T00:00:00Z"
"""How Alertmanager writes an end that has not come."""


def alertmanager_alerts(notifications: Sequence[Notification]) -> list[dict[str, Any]]:
    """Body of a POST to Alertmanager's `/api/v2/alerts`."""
    return [
        {
            "labels": dict(one.labels),
            "annotations": dict(one.annotations),
            "startsAt": _rfc3339(one.starts_at),
            "endsAt": _rfc3339(one.valid_until if one.ends_at is None else one.ends_at),
        }
        for one in notifications
    ]


def webhook_message(
    notifications: Sequence[Notification], *, receiver: str = "gmpo", external_url: str = ""
) -> dict[str, Any]:
    """One message in the format of Alertmanager's webhooks, version 4.

    Args:
        notifications: of one `alertname`, at least one.
        receiver: name that the message gives its receiver.
        external_url: where a person can look; empty if nowhere.
    """
    name = notifications[0].labels["alertname"]
    return {
        "version": "4",
        "groupKey": f'{{}}:{{alertname="{name}"}}',
        "truncatedAlerts": 0,
        "status": "firing" if any(one.ends_at is None for one in notifications) else "resolved",
        "receiver": receiver,
        "groupLabels": {"alertname": name},
        "commonLabels": _common([one.labels for one in notifications]),
        "commonAnnotations": _common([one.annotations for one in notifications]),
        "externalURL": external_url,
        "alerts": [
            {
                "status": one.status,
                "labels": dict(one.labels),
                "annotations": dict(one.annotations),
                "startsAt": _rfc3339(one.starts_at),
                "endsAt": _NEVER if one.ends_at is None else _rfc3339(one.ends_at),
                "generatorURL": external_url,
                "fingerprint": fingerprint(one.labels),
            }
            for one in notifications
        ],
    }


def alertmanager_sink(url: str, *, timeout_seconds: float = 10.0) -> Sink:
    """Sends to an Alertmanager.

    Args:
        url: its address, such as `http://127.0.0.1:9093`, without `/api`.
        timeout_seconds: of one attempt.

    Raises:
        ConfigError: the URL is none of HTTP.
    """
    address = f"{_checked(url).rstrip('/')}/api/v2/alerts"
    return lambda news: _post(address, alertmanager_alerts(news), timeout_seconds=timeout_seconds)


def webhook_sink(url: str, *, timeout_seconds: float = 10.0) -> Sink:
    """Sends to a receiver of Alertmanager's webhooks.

    Args:
        url: where messages are posted.
        timeout_seconds: of one attempt.

    Raises:
        ConfigError: the URL is none of HTTP.
    """
    address = _checked(url)
    return lambda news: _post(address, webhook_message(news), timeout_seconds=timeout_seconds)


def apprise_sink(urls: Sequence[str]) -> Sink:
    """Sends a short text to services that apprise knows: mail, chat, telephones.

    Args:
        urls: as apprise writes them, such as `mailto://...`; they may hold secrets and are not
            repeated in errors.

    Raises:
        DependencyError: apprise is not installed.
        ConfigError: apprise does not know one of the URLs, or there are none.
    """
    try:
        from apprise import Apprise, NotifyType
    except ImportError:
        raise DependencyError(
            "alerts to these services need apprise; install it with pip install 'gmpo[alerts]'"
        ) from None
    services = Apprise()
    for place, url in enumerate(urls, 1):
        if not services.add(url):
            raise ConfigError(
                f"apprise does not know URL {place} of {len(urls)}; see its list of services"
            )
    if not urls:
        raise ConfigError("there is no URL for apprise; give at least one")

    def send(news: Sequence[Notification]) -> None:
        over = all(one.status == "resolved" for one in news)
        # Apprise tells no reason, only whether every service took it.
        if not services.notify(
            title=f"{'Over' if over else 'Alert'}: {news[0].labels['alertname']}",
            body="\n".join(map(_sentence, news)),
            notify_type=NotifyType.SUCCESS if over else NotifyType.WARNING,
        ):
            raise DeliveryError("apprise could not deliver to all services", may_pass=True)

    return send


class Delivery:
    """Hands notifications to receivers, each at its own pace.

    Args:
        sinks: by name; at least one.
        queue_size: messages that wait for a receiver; more are dropped and counted.
        attempts: of one message, at least 1; the pause doubles from one to the next.
        first_pause_seconds: before the second attempt; at most 60 later on.
        tell: told in one sentence, from a receiver's thread, that a sink raised what none should.

    Raises:
        ConfigError: there is no sink, or a number is out of its range.
    """

    def __init__(
        self,
        sinks: Mapping[str, Sink],
        *,
        queue_size: int = 256,
        attempts: int = 6,
        first_pause_seconds: float = 1.0,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        if not sinks or queue_size < 1 or attempts < 1 or not first_pause_seconds >= 0:
            raise ConfigError(
                f"delivery has {len(sinks)} sinks, queue_size {queue_size}, attempts {attempts} "
                f"and first_pause_seconds {first_pause_seconds}; it needs at least one sink, one "
                "place, one attempt, and no pause below 0"
            )
        pauses = [
            min(first_pause_seconds * 2**attempt, _LONGEST_PAUSE_SECONDS)
            for attempt in range(attempts - 1)
        ]
        self._lines = {
            name: _Line(name, sink, queue_size=queue_size, pauses=pauses, tell=tell)
            for name, sink in sinks.items()
        }

    def send(self, notifications: Sequence[Notification]) -> None:
        """Queue one message an `alertname` for every receiver; never waits."""
        groups: dict[str, list[Notification]] = {}
        for one in notifications:
            groups.setdefault(one.labels["alertname"], []).append(one)
        for line in self._lines.values():
            for group in groups.values():
                line.put(group)

    def counts(self) -> dict[str, dict[str, int]]:
        """Messages of each receiver: `sent`, `retried`, and dropped ones by reason.

        `dropped_full`: its queue was full. `dropped_failed`: every attempt failed, or the receiver
        refused it. `dropped_broken`: its sink raised what no sink should. `dropped_closed`: sent or
        still undelivered when the delivery was closed.
        """
        return {name: line.counts() for name, line in self._lines.items()}

    def last_errors(self) -> dict[str, str]:
        """What each receiver that failed said last."""
        return {name: line.last_error for name, line in self._lines.items() if line.last_error}

    def close(self, *, timeout_seconds: float = 10.0) -> None:
        """Deliver what waits, with one attempt more each, for at most this long."""
        deadline = time.monotonic() + timeout_seconds
        for line in self._lines.values():
            line.begin_closing()
        for line in self._lines.values():
            line.finish(deadline)


class _Line:
    """One receiver's queue and thread."""

    def __init__(
        self,
        name: str,
        sink: Sink,
        *,
        queue_size: int,
        pauses: Sequence[float],
        tell: Callable[[str], None],
    ) -> None:
        self.last_error = ""
        self._name, self._tell = name, tell
        self._sink, self._queue_size, self._pauses = sink, queue_size, pauses
        self._counts: Counter[str] = Counter()
        self._waiting: deque[Sequence[Notification]] = deque()
        self._is_busy = self._is_closed = False
        self._changed = threading.Condition()
        self._closing = threading.Event()
        # A receiver that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"alerts-{name}", daemon=True)
        self._thread.start()

    def put(self, message: Sequence[Notification]) -> None:
        with self._changed:
            if self._closing.is_set():
                self._counts["dropped_closed"] += 1
            elif len(self._waiting) >= self._queue_size:
                self._counts["dropped_full"] += 1
            else:
                self._waiting.append(message)
                self._changed.notify()

    def counts(self) -> dict[str, int]:
        with self._changed:
            return dict(self._counts)

    def begin_closing(self) -> None:
        with self._changed:
            self._closing.set()
            self._changed.notify()

    def finish(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        with self._changed:
            self._is_closed = True
            self._counts["dropped_closed"] += len(self._waiting) + self._is_busy
            self._waiting.clear()
            self._is_busy = False

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing.is_set():
                    self._changed.wait()
                if not self._waiting:
                    return
                message = self._waiting.popleft()
                self._is_busy = True
            fate = self._deliver(message)
            with self._changed:
                # A message that was counted as dropped when closing ended is not counted twice.
                if not self._is_closed:
                    self._counts[fate] += 1
                self._is_busy = False

    def _deliver(self, message: Sequence[Notification]) -> str:
        """What became of it, a name of `Delivery.counts`."""
        for pause in (*self._pauses, None):
            try:
                self._sink(message)
            except DeliveryError as error:
                self.last_error = str(error)
                if pause is None or not error.may_pass or self._closing.is_set():
                    return "dropped_failed"
            except Exception as error:  # noqa: BLE001 - the thread has to deliver what comes next
                # What it says may hold a URL with its secrets.
                self.last_error = f"its sink failed with {type(error).__name__}"
                self._tell(f"a message for {self._name} is dropped: {self.last_error}")
                return "dropped_broken"
            else:
                return "sent"
            self._closing.wait(pause)
            with self._changed:
                self._counts["retried"] += 1
        raise AssertionError("the last attempt has no pause after it")


def _post(url: str, body: object, *, timeout_seconds: float) -> None:
    try:
        response = httpx2.post(url, json=body, timeout=timeout_seconds)
    except httpx2.RequestError as error:
        said = without_url(str(error) or type(error).__name__, url)
        what = "was not reached" if isinstance(error, httpx2.TransportError) else "was not read"
        raise DeliveryError(f"{shown_url(url)} {what}: {said}", may_pass=True) from None
    if not response.is_success:
        said = without_url(response.text, url)[:200]
        raise DeliveryError(
            f"{shown_url(url)} answered {response.status_code}: {said}",
            # 408 and 429 ask to come again; other 4xx will be the same next time.
            may_pass=response.status_code in (408, 429) or response.status_code >= 500,
        )


def _checked(url: str) -> str:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        # What is wrong with it may be a part of a password.
        raise ConfigError(
            f"the URL of a receiver of alerts cannot be read; {_ADDRESS} (it is not repeated here)"
        ) from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"alerts cannot be sent to {shown_url(url)}; {_ADDRESS}")
    return url


def _common(many: Sequence[Mapping[str, str]]) -> dict[str, str]:
    first = many[0]
    return {name: value for name, value in first.items() if all(m.get(name) == value for m in many)}


def _sentence(one: Notification) -> str:
    labels = ", ".join(f"{name} {one.labels[name]}" for name in sorted(one.labels))
    notes = " ".join(f"{name}: {text}" for name, text in one.annotations.items())
    return f"{one.status} ({labels}) {notes}".rstrip()


def _rfc3339(unix_seconds: float) -> str:
    return datetime.fromtimestamp(unix_seconds, UTC).isoformat().replace("+00:00", "Z")
