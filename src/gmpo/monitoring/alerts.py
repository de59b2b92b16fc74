"""When trouble becomes an alert, when it is told again, and when it is over: a pure state machine.

A condition has to last before it fires, so that one bad minute wakes nobody; it is told again only
after the repeat interval; it has to be gone for a while before it is over, so that a signal which
swings about its threshold does not flap. `advance` reads no clock: the caller gives the time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gmpo.errors import ConfigError

__all__ = [
    "Alert",
    "AlertTimes",
    "Condition",
    "Notification",
    "Now",
    "Severity",
    "advance",
    "fingerprint",
    "firing_labels",
]

Severity = Literal["warning", "critical"]

_LABEL_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_FNV_OFFSET = 14695981039346656037
_FNV_PRIME = 1099511628211


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Something that is wrong now.

    Attributes:
        labels: tell troubles apart; `alertname` names the kind of trouble. Names are made of
            letters, digits and underscores, values are not empty, and `severity` is none of them.
        severity: how bad it is; it may change while the trouble lasts.
        annotations: for people: what was seen, what to do.

    Raises:
        ConfigError: a label is not allowed, or there is no `alertname`.
    """

    labels: Mapping[str, str]
    severity: Severity
    annotations: Mapping[str, str]

    def __post_init__(self) -> None:
        for name, value in self.labels.items():
            if not _LABEL_NAME.fullmatch(name) or not value or name == "severity":
                raise ConfigError(
                    f"the label {name!r} = {value!r} is not allowed; names are letters, digits and "
                    "underscores, values are not empty, and `severity` is a field of its own"
                )
        if "alertname" not in self.labels:
            raise ConfigError(
                f"the labels {dict(self.labels)} name no trouble; give an `alertname`"
            )


@dataclass(frozen=True, kw_only=True)
class AlertTimes:
    """How patient alerts are; all in seconds.

    Attributes:
        fire_after: how long a condition lasts before it fires; at least 0.
        resolve_after: how long it is gone before it is over; at least 0.
        repeat_every: how often an alert that lasts is told again; above 0.

    Raises:
        ConfigError: one is out of its range or not finite.
    """

    fire_after: float = 60.0
    resolve_after: float = 120.0
    repeat_every: float = 4 * 3600.0

    def __post_init__(self) -> None:
        given = (self.fire_after, self.resolve_after, self.repeat_every)
        if not all(map(math.isfinite, given)) or min(given) < 0 or self.repeat_every == 0:
            raise ConfigError(
                f"fire_after, resolve_after and repeat_every are {given} seconds; "
                "they must be finite, at least 0, and the last above 0"
            )


@dataclass(frozen=True, kw_only=True)
class Now:
    """One moment on two clocks.

    Attributes:
        monotonic: seconds of a clock that nobody sets; intervals are taken from it alone.
        unix: seconds since 1970, which are only told and stored.
    """

    monotonic: float
    unix: float


@dataclass(frozen=True, kw_only=True)
class Alert:
    """One trouble that lasts; `monotonic` times are comparable in one process only.

    Attributes:
        condition: as it was last seen.
        status: "pending" until it has lasted long enough.
        began: monotonic, when it was first seen.
        seen: monotonic, when it was last seen.
        starts_at: unix seconds at which it was first seen.
        told: monotonic, when it was last told; None while it is pending.
    """

    condition: Condition
    status: Literal["pending", "firing"]
    began: float
    seen: float
    starts_at: float
    told: float | None = None


@dataclass(frozen=True, kw_only=True)
class Notification:
    """What is to be told about an alert.

    Attributes:
        status: "firing" also where it is told again.
        labels: of the condition, with its severity.
        annotations: for people.
        starts_at: unix seconds at which the trouble was first seen.
        ends_at: unix seconds at which it was over; None while it lasts.
        valid_until: unix seconds after which a firing alert that was not told again may be taken
            for over: three repeat intervals, for receivers that outlive the monitor.
    """

    status: Literal["firing", "resolved"]
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    starts_at: float
    ends_at: float | None
    valid_until: float


def fingerprint(labels: Mapping[str, str]) -> str:
    """16 hexadecimal digits that tell label sets apart, the same as Alertmanager's.

    64-bit FNV-1a over names in order and their values, each ended by a byte 255.
    """
    digest = _FNV_OFFSET
    for name in sorted(labels):
        for byte in name.encode() + b"\xff" + labels[name].encode() + b"\xff":
            digest = ((digest ^ byte) * _FNV_PRIME) % 2**64
    return f"{digest:016x}"


def advance(
    alerts: Mapping[str, Alert], conditions: Sequence[Condition], *, now: Now, times: AlertTimes
) -> tuple[dict[str, Alert], list[Notification]]:
    """Alerts after a look at what is wrong now, and what is to be told.

    A change of severity is told at once, as the end of the one and the begin of the other, since
    receivers take severity for a part of an alert's identity.

    Args:
        alerts: by fingerprint, as the last call returned them; empty at first.
        conditions: all that is wrong now. Of two with the same labels the more severe one counts.
        now: not before the last call's.
        times: how long to wait.
    """
    wrong: dict[str, Condition] = {}
    for condition in conditions:
        key = fingerprint(condition.labels)
        if key not in wrong or condition.severity == "critical":
            wrong[key] = condition
    after: dict[str, Alert] = {}
    told: list[Notification] = []
    for key in [*alerts, *(key for key in wrong if key not in alerts)]:
        alert = alerts.get(key)
        if key in wrong:
            after[key], news = _seen(alert, wrong[key], now=now, times=times)
            told.extend(news)
        elif alert is not None and alert.status == "firing":
            if now.monotonic - alert.seen < times.resolve_after:
                after[key] = alert
            else:
                told.append(_notification(alert, "resolved", now=now, times=times))
    return after, told


def firing_labels(alerts: Mapping[str, Alert]) -> list[dict[str, str]]:
    """Labels, severity included, of the alerts that fire, as `advance` returned them."""
    return [
        {**alert.condition.labels, "severity": alert.condition.severity}
        for alert in alerts.values()
        if alert.status == "firing"
    ]


def _seen(
    alert: Alert | None, condition: Condition, *, now: Now, times: AlertTimes
) -> tuple[Alert, list[Notification]]:
    before = alert or Alert(
        condition=condition,
        status="pending",
        began=now.monotonic,
        seen=now.monotonic,
        starts_at=now.unix,
    )
    after = replace(before, condition=condition, seen=now.monotonic)
    if after.status == "pending" and now.monotonic - after.began < times.fire_after:
        return after, []
    news = list(_news(before, after, now=now, times=times))
    told = now.monotonic if news else after.told
    return replace(after, status="firing", told=told), news


def _news(before: Alert, after: Alert, *, now: Now, times: AlertTimes) -> Iterator[Notification]:
    changed = before.condition.severity != after.condition.severity
    if before.told is not None and changed:
        yield _notification(before, "resolved", now=now, times=times)
    if before.told is None or changed or now.monotonic - before.told >= times.repeat_every:
        yield _notification(after, "firing", now=now, times=times)


def _notification(
    alert: Alert, status: Literal["firing", "resolved"], *, now: Now, times: AlertTimes
) -> Notification:
    return Notification(
        status=status,
        labels={**alert.condition.labels, "severity": alert.condition.severity},
        annotations=dict(alert.condition.annotations),
        starts_at=alert.starts_at,
        ends_at=now.unix if status == "resolved" else None,
        valid_until=now.unix + 3 * times.repeat_every,
    )
