"""`gmpo ab`: experiments on split traffic, begun, looked at and ended."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from gmpo.cli.conventions import JsonOption, existing_store, refuses_clearly
from gmpo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from gmpo.abtest.report import ExperimentReport
    from gmpo.store import Experiment, Store

__all__ = ["ab", "report", "size", "start", "status", "stop", "weights"]

ab = typer.Typer(help="Experiments on split traffic: start, status, report, weights, stop, size.")

_Name = Annotated[str, typer.Argument(help="Name of the experiment.")]
_StoreUrl = Annotated[
    str, typer.Option("--store", help="The gateway's store: a SQLite file or a PostgreSQL URL.")
]


@ab.command()
@refuses_clearly
def start(
    name: _Name,
    store: _StoreUrl,
    control: Annotated[str, typer.Option(help="The model that serves now.")],
    candidate: Annotated[str, typer.Option(help="The model that may replace it.")],
    share: Annotated[float, typer.Option(help="Share of the units that get the candidate.")] = 0.5,
    primary: Annotated[
        str, typer.Option(help="Metric that decides: success, quality or latency.")
    ] = "success",
    guardrails: Annotated[
        list[str] | None,
        typer.Option(
            "--guardrail",
            help="METRIC=MARGIN that must not be harmed, e.g. latency_p95=0.1; repeatable.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE of the plan, e.g. max_units=5000; repeatable."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Begin an experiment: gmpo serve --experiment NAME splits its traffic by this plan."""
    from gmpo.abtest.plan import plan_of
    from gmpo.shown_urls import store_option
    from gmpo.store import Experiment

    config = {
        "salt": secrets.token_hex(8),
        "models": {"control": control, "candidate": candidate},
        "weights": _weights(share),
        "primary": primary,
        "guardrails": [_guardrail(word) for word in guardrails or []],
        **dict(_setting(word) for word in settings or []),
    }
    plan = plan_of(config)
    if not name.strip():
        raise ConfigError("the experiment's name is empty; give it one")
    with _opened(store) as opened:
        opened.put_experiment(
            Experiment(
                name=name,
                created=time.time(),
                status="running",
                config=plan.model_dump(mode="json"),
            ),
            expected=None,
        )
        option = store_option(opened.where)
    if as_json:
        print(json.dumps({"name": name, "status": "running", "plan": plan.model_dump(mode="json")}))
        return
    Console().print(
        Text(
            f"{name} runs: {100 * share:g} % of the units get {candidate} wherever gmpo serve "
            f"--experiment {name} splits traffic; look at it any time: gmpo ab report {name}"
            f"{option}"
        ),
        soft_wrap=True,
    )


@ab.command()
@refuses_clearly
def status(store: _StoreUrl, as_json: JsonOption = False) -> None:
    """Every experiment in one sentence."""
    from gmpo.abtest_report import report_of

    with _opened(store, read_only=True) as opened:
        found = [(one, report_of(opened, one)) for one in opened.experiments()]
    if as_json:
        print(json.dumps([_summary(one, report) for one, report in found]))
        return
    console = Console()
    if not found:
        console.print("no experiment yet; begin one with gmpo ab start")
    for one, report in found:
        state = _state_words(one, report)
        console.print(Text(f"{one.name} ({state}): {report.recommendation}"), soft_wrap=True)


@ab.command()
@refuses_clearly
def report(
    name: _Name,
    store: _StoreUrl,
    plot: Annotated[
        Path | None, typer.Option(help="PNG file for the confidence sequence over time.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What an experiment shows now; it may be looked at any time and as often as one likes."""
    from gmpo.abtest_report import plot_experiment, render_experiment, report_of

    with _opened(store, read_only=True) as opened:
        found = report_of(opened, _experiment(opened, name))
    if plot is not None:
        plot_experiment(found, plot)
    if as_json:
        print(json.dumps(found.as_dict()))
        return
    Console().print(render_experiment(found))


@ab.command()
@refuses_clearly
def stop(name: _Name, store: _StoreUrl, as_json: JsonOption = False) -> None:
    """End an experiment; what it shows now is kept as its decision."""
    from gmpo.abtest_report import report_of
    from gmpo.store import Event

    with existing_store(store) as opened:
        experiment = _experiment(opened, name)
        if experiment.status == "stopped":
            raise ConfigError(f"experiment {name!r} was stopped already")
        stopped = replace(experiment, status="stopped")
        found = report_of(opened, stopped, now=time.time())
        decision = found.as_dict()
        opened.put_experiment(
            replace(stopped, decision=decision),
            expected=experiment,
            event=Event(kind="decision", time=time.time(), payload=decision, experiment=name),
        )
    if as_json:
        print(json.dumps(decision))
        return
    Console().print(Text(f"{name} is stopped. {found.recommendation}"), soft_wrap=True)


@ab.command()
@refuses_clearly
def weights(
    name: _Name,
    store: _StoreUrl,
    share: Annotated[
        float, typer.Option(help="Share of the units that get the candidate from now on.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Change the arms' shares while it runs; its evidence begins anew."""
    from gmpo.abtest.plan import plan_of
    from gmpo.store import Event

    with existing_store(store) as opened:
        experiment = _experiment(opened, name)
        before = plan_of(experiment.config)
        now = time.time()
        changed_to = {"weights": _weights(share), "weights_since": now}
        plan = plan_of({**experiment.config, **changed_to})
        ends = plan.ends(experiment.created)
        if experiment.status != "running" or (ends is not None and now >= ends):
            raise ConfigError(
                f"experiment {name!r} splits no traffic any more, so its shares change nothing; "
                "begin another one with gmpo ab start"
            )
        if plan.weights == before.weights:
            raise ConfigError(
                f"the candidate of experiment {name!r} has a share of {share:g} already; changing "
                "nothing keeps its evidence"
            )
        changed = {"before": before.weights, "after": plan.weights}
        opened.put_experiment(
            replace(experiment, config=plan.model_dump(mode="json")),
            expected=experiment,
            event=Event(kind="weights", time=now, payload=changed, experiment=name),
        )
    if as_json:
        print(json.dumps({"name": name, **changed}))
        return
    candidate = plan.models["candidate"]
    Console().print(
        Text(
            f"{name}: {100 * share:g} % of the units get {candidate}, "
            f"{100 * before.weights['candidate']:g} % did; gateways follow within seconds. Units "
            "first seen before count no more: the evidence begins anew"
        ),
        soft_wrap=True,
    )


@ab.command()
@refuses_clearly
def size(
    base: Annotated[float, typer.Option(help="Success rate of control, between 0 and 1.")],
    effect: Annotated[float, typer.Option(help="Smallest difference that is to be found.")],
    share: Annotated[float, typer.Option(help="Share of the units that get the candidate.")] = 0.5,
    power: Annotated[float, typer.Option(help="Probability to find it.")] = 0.8,
    alpha: Annotated[float, typer.Option(help="Probability of a false alarm, ever.")] = 0.05,
    as_json: JsonOption = False,
) -> None:
    """Units that a difference of success rates needs, and when it would be found."""
    from gmpo.abtest.planning import required_units, share_deviation, stopping_times

    for option, value in (("base", base), ("base + effect", base + effect), ("share", share)):
        if not 0 < value < 1:
            raise ConfigError(f"{option} is {value}; it must lie between 0 and 1")
    if effect == 0 or not 0 < power < 1 or not 0 < alpha < 1:
        raise ConfigError(
            f"effect {effect} must not be 0, power {power} and alpha {alpha} lie between 0 and 1"
        )
    deviation = share_deviation(control=base, candidate=base + effect, candidate_weight=share)
    tuned_for = 1000.0
    for _ in range(6):  # the boundary is narrowest near the number that it is tuned for
        units = required_units(effect, deviation, alpha=alpha, tuned_for=tuned_for, power=power)
        tuned_for = float(units)
    times = stopping_times(
        effect, deviation, alpha=alpha, tuned_for=tuned_for, looks=(100, max(200, 2 * units))
    )
    if as_json:
        print(
            json.dumps(
                {"units": units, "median_units": times.median_units, "tuned_for": round(tuned_for)}
            )
        )
        return
    Console().print(
        Text(
            f"{units} units of both arms find {100 * effect:+g} points at {100 * base:g} % with "
            f"probability {power:g}; half of such experiments stop by {times.median_units:.0f}. "
            f"Begin it with --set tuned_for={round(tuned_for)} --set max_units={2 * units}"
        ),
        soft_wrap=True,
    )


def _weights(share: float) -> dict[str, float]:
    return {"control": round(1 - share, 12), "candidate": share}


@contextmanager
def _opened(url: str, *, read_only: bool = False) -> Iterator[Store]:
    from gmpo.store import open_store

    with open_store(url, read_only=read_only) as store:
        yield store


def _experiment(store: Store, name: str) -> Experiment:
    found = store.experiment(name)
    if found is None:
        names = ", ".join(one.name for one in store.experiments()) or "none yet"
        raise DataError(f"there is no experiment {name!r}; there are: {names}")
    return found


def _is_over(experiment: Experiment, report: ExperimentReport) -> bool:
    """Whether nobody stopped it, but its hours are over."""
    ends = report.plan.ends(experiment.created)
    return experiment.status == "running" and ends is not None and report.time >= ends


def _state_words(experiment: Experiment, report: ExperimentReport) -> str:
    from gmpo.abtest.wording import moment

    ends = report.plan.ends(experiment.created)
    stopped = _stopped_at(experiment)
    if stopped is not None:
        return f"stopped at {moment(stopped)}"
    if experiment.status != "running" or ends is None:
        return experiment.status
    if _is_over(experiment, report):
        return f"over since {moment(ends)}, everybody gets {report.plan.models['control']}"
    return f"running until {moment(ends)}"


def _stopped_at(experiment: Experiment) -> float | None:
    """When `stop` looked at it for the last time, unix seconds; None while it is not stopped."""
    if experiment.status != "stopped" or experiment.decision is None:
        return None
    at: float | None = experiment.decision.get("time")
    return at


def _summary(experiment: Experiment, report: ExperimentReport) -> dict[str, object]:
    return {
        "name": experiment.name,
        "status": "over" if _is_over(experiment, report) else experiment.status,
        "ends": report.plan.ends(experiment.created),
        "stopped": _stopped_at(experiment),
        "units": report.num_units,
        "action": report.decision.action,
        "recommendation": report.recommendation,
    }


def _guardrail(word: str) -> dict[str, object]:
    metric, is_there, margin = word.partition("=")
    if not is_there:
        raise ConfigError(f"--guardrail {word!r} must be METRIC=MARGIN, e.g. success=0.02")
    return {"metric": metric, "margin": _value(margin)}


def _setting(word: str) -> tuple[str, object]:
    key, is_there, value = word.partition("=")
    if not is_there:
        raise ConfigError(f"--set {word!r} must be KEY=VALUE, e.g. max_units=5000")
    return key, _value(value)


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
