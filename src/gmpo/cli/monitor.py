"""`gmpo monitor`."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gmpo.cli.conventions import refuses_clearly, warn
from gmpo.errors import DeliveryError, GmpoError, RunStopped

if TYPE_CHECKING:
    from gmpo.monitoring.alerts import Condition, Notification
    from gmpo.monitoring.delivery import Delivery, Sink

__all__ = ["monitor"]

_CLOSING_SECONDS = 10.0


@refuses_clearly
def monitor(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, finished or still training.")],
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
    """Send the alarms of runs as alerts until SIGTERM or Ctrl-C; each is printed as well."""
    from gmpo.monitoring.alerts import Alert, AlertTimes, Now, advance
    from gmpo.run_conditions import run_conditions

    for run in runs:
        run_conditions(run)  # what is no run folder is refused before anything is followed
    # The guard has waited already: an alarm of its own is no single bad round.
    times = AlertTimes(fire_after=0, resolve_after=0, repeat_every=3600 * repeat_hours)
    alerts: dict[str, Alert] = {}
    with _ending_quietly(), _delivering(_sinks(alertmanager, webhook, apprise or []), once) as to:
        while True:
            now = Now(monotonic=time.monotonic(), unix=time.time())
            alerts, told = advance(alerts, _conditions(runs), now=now, times=times)
            _tell(told)
            if to is not None:
                to.send(told)
            if once:
                return
            time.sleep(every)


def _conditions(runs: Sequence[Path]) -> list[Condition]:
    """Of all runs; one that cannot be read hides none of the others."""
    from gmpo.run_conditions import run_conditions, unreadable_run

    found: list[Condition] = []
    for run in runs:
        try:
            found.extend(run_conditions(run))
        except GmpoError as error:
            found.append(unreadable_run(run, error))
    return found


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
        print(
            f"{one.status} {one.labels['severity']} {one.labels['alertname']} "
            f"{one.labels['run']}: {one.annotations['summary']}; {one.annotations['action']}",
            flush=True,
        )


@contextmanager
def _delivering(sinks: dict[str, Sink], is_once: bool) -> Iterator[Delivery | None]:
    """Deliver until the end; what was not delivered is told, and after a single look an error."""
    from gmpo.monitoring.delivery import Delivery

    if not sinks:
        yield None
        return
    delivery = Delivery(sinks)
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


@contextmanager
def _ending_quietly() -> Iterator[None]:
    """SIGTERM ends with 0, Ctrl-C with 130, both after what waits was delivered."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    except KeyboardInterrupt:
        raise RunStopped("the runs are no longer watched; they go on") from None
    finally:
        signal.signal(signal.SIGTERM, before)
