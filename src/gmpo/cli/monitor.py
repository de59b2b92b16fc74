"""`gmpo monitor`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gmpo.cli.conventions import ending_quietly, existing_store, refuses_clearly, warn
from gmpo.errors import ConfigError, DeliveryError

if TYPE_CHECKING:
    from gmpo.monitored import Monitored
    from gmpo.monitoring.alerts import Notification
    from gmpo.monitoring.delivery import Delivery, Sink

__all__ = ["monitor"]

_CLOSING_SECONDS = 10.0


@refuses_clearly
def monitor(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run folders, finished or still training.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(help="Store whose anomalies of answers are sent, and where alerts are kept."),
    ] = None,
    alertmanager: Annotated[
        str | None, typer.Option(help="Address of an Alertmanager, as http://127.0.0.1:9093.")
    ] = None,
    webhook: Annotated[
        str | None, typer.Option(help="Receiver of Alertmanager's webhooks, version 4.")
    ] = None,
    apprise: Annotated[
        list[str] | None, typer.Option(help="URL of one of apprise's services; repeatable.")
    ] = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 15.0,
    repeat_hours: Annotated[
        float, typer.Option(min=0.01, help="Tell an alert that lasts again after so long.")
    ] = 4.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
) -> None:
    """Send alarms of runs and anomalies of answers as alerts until SIGTERM or Ctrl-C."""
    from gmpo.monitoring.alerts import Alert, AlertTimes, Now, advance, firing_labels

    if not runs and store is None:
        raise ConfigError("there is nothing to monitor; name a run folder, or a store by --store")
    # Guard and gateway have waited already: what they say is no single bad round or minute.
    times = AlertTimes(fire_after=0, resolve_after=0, repeat_every=3600 * repeat_hours)
    alerts: dict[str, Alert] = {}
    sinks = _sinks(alertmanager, webhook, apprise or [])
    with (
        ending_quietly("the runs are no longer watched; they go on"),
        _monitoring(runs or [], store) as seen,
        _delivering(sinks, once) as to,
    ):
        while True:
            now = Now(monotonic=time.monotonic(), unix=time.time())
            alerts, told = advance(alerts, seen.look(now.unix), now=now, times=times)
            if to is not None:
                to.send(told)
            seen.keep(told, firing=firing_labels(alerts))
            _tell(told)  # last: who reads it may end this process
            if once:
                if not told:
                    warn("nothing is wrong now: no alert fires, and none has ended")
                return
            time.sleep(every)


@contextmanager
def _monitoring(runs: Sequence[Path], url: str | None) -> Iterator[Monitored]:
    """What is looked at, with its store open."""
    from gmpo.monitored import Monitored

    if url is None:
        yield Monitored(runs, None)
        return
    with existing_store(url) as store:
        seen = Monitored(runs, store)
        try:
            yield seen
        finally:
            if seen.num_unwritten:
                count = seen.num_unwritten
                warn(f"{count} changes of alerts could not be written to {store.where}")


def _sinks(
    alertmanager: str | None, webhook: str | None, apprise: Sequence[str]
) -> dict[str, Sink]:
    from gmpo.monitoring.delivery import alertmanager_sink, apprise_sink, webhook_sink

    sinks: dict[str, Sink] = {}
    if alertmanager is not None:
        sinks["alertmanager"] = alertmanager_sink(alertmanager)
    if webhook is not None:
        sinks["webhook"] = webhook_sink(webhook)
    if apprise:
        sinks["apprise"] = apprise_sink(apprise)
    return sinks


def _tell(notifications: Sequence[Notification]) -> None:
    for one in notifications:
        of_what = [v for name, v in one.labels.items() if name not in ("alertname", "severity")]
        print(
            f"{one.status} {one.labels['severity']} {one.labels['alertname']} "
            f"{' '.join(of_what)}: {one.annotations['summary']}; {one.annotations['action']}",
            flush=True,
        )


@contextmanager
def _delivering(sinks: dict[str, Sink], is_once: bool) -> Iterator[Delivery | None]:
    """Deliver until the end; what was not delivered is told, and after a single look an error."""
    from gmpo.monitoring.delivery import Delivery

    if not sinks:
        yield None
        return
    delivery = Delivery(sinks, tell=warn)
    try:
        yield delivery
    finally:
        delivery.close(timeout_seconds=_CLOSING_SECONDS)
        lost = _lost(delivery)
        if lost and not is_once:
            warn(lost)
    if lost and is_once:
        raise DeliveryError(lost, may_pass=True)


def _lost(delivery: Delivery) -> str:
    """What did not arrive and why; empty if everything did."""
    errors = delivery.last_errors()
    return "; ".join(
        f"{dropped} messages did not reach {name}: {errors.get(name, 'it did not answer in time')}"
        for name, counts in delivery.counts().items()
        if (dropped := sum(n for fate, n in counts.items() if fate.startswith("dropped")))
    )
