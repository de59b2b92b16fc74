"""Debian's promtool says which rules of `deploy/prometheus/rules.yml` fire for a gateway's figures.

Each scenario is twenty minutes alike, or a loss of events in the fourth, and every rule is asked.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import pytest
from tests.programs import program

from gmpo.monitoring.actions import ACTIONS
from gmpo.monitoring.serving_monitor import Judgement, StreamKey
from gmpo.monitoring.severity import Level, report_of
from gmpo.serving.answer_record import AnswerRecord
from gmpo.serving.backend import AnswerReport, GenerationRequest, Usage
from gmpo.serving.figures import GatewayFigures

RULES = Path(__file__).resolve().parents[2] / "deploy" / "prometheus" / "rules.yml"
BY_NAME = dict(re.findall(r"- alert: (\w+)\n(.*?)(?=- alert:|\Z)", RULES.read_text(), re.DOTALL))
MINUTES = 40

Alerts: TypeAlias = Mapping[str, tuple[Mapping[str, str], str]]
"""What fires: labels beside the severity, and the summary, by the rule's name."""


def answer(
    *,
    status: int = 200,
    version: str | None = "ab12",
    finish_reason: str = "stop",
    seconds: float = 1.5,
    fell_back: bool = False,
) -> AnswerRecord:
    return AnswerRecord(
        request=GenerationRequest(id="1", route="chat", model="m", prompt="1+1=", stream=False),
        report=AnswerReport(
            backend="" if version is None else "here",
            model_version=version,
            served_variant="control",
            fell_back=fell_back,
        ),
        time=time.time(),
        status=status,
        finish_reason=finish_reason,
        usage=Usage(prompt_tokens=5, completion_tokens=7),
        latency_seconds=seconds,
        first_token_seconds=None,
        error=None,
    )


def minute_of(answers: Iterable[tuple[int, AnswerRecord]]) -> GatewayFigures:
    figures = GatewayFigures()
    for count, record in answers:
        for _ in range(count):
            figures.observe(record)
    return figures


def responses(by_status: Mapping[int, int]) -> GatewayFigures:
    figures = GatewayFigures()
    statuses = {("chat", status): count for status, count in by_status.items()}
    entrance: Any = SimpleNamespace(statuses=statuses, turned_away={}, num_active=0)
    admission: Any = SimpleNamespace(num_running=0, num_queued=0)
    figures.watch(admission, entrance)
    return figures


def at_level(level: Level) -> GatewayFigures:
    figures = GatewayFigures()
    key = StreamKey(model_version="ab12", variant="control")
    report = report_of({}, level=level, actions=ACTIONS)
    figures.judged(Judgement(key=key, report=report, is_news=True))
    return figures


def series(figures: GatewayFigures) -> list[dict[str, str]]:
    """What was counted in a minute comes again in each; a gauge stays."""
    found = []
    for line in figures.exposition().decode().splitlines():
        name, value = line.rsplit(" ", 1)
        if name.startswith(("#", "gmpo_process")):
            continue
        grows = re.match(r"\w+(_total|_bucket|_sum|_count)\b", name) is not None
        begin, step = ("0", value) if grows else (value, "0")
        found.append({"series": name, "values": f"{begin}+{step}x{MINUTES}"})
    return found


def expected(alerts: Alerts, name: str) -> list[dict[str, Any]]:
    rule = BY_NAME[name]
    (severity,) = re.findall(r"severity: (\w+)", rule)
    (action,) = re.findall(r'action: "(.*)"', rule)
    return [
        {
            "exp_labels": {**labels, "severity": severity},
            "exp_annotations": {"summary": summary, "action": action},
        }
        for one, (labels, summary) in alerts.items()
        if one == name
    ]


def judge(found: list[dict[str, str]], at: Mapping[str, Alerts], folder: Path) -> None:
    """Ask promtool which rules fire at these times, and compare."""
    asked = [
        {"eval_time": moment, "alertname": name, "exp_alerts": expected(alerts, name)}
        for moment, alerts in at.items()
        for name in BY_NAME
    ]
    case = {"interval": "1m", "input_series": found, "alert_rule_test": asked}
    tests = folder / "tests.yml"
    tests.write_text(json.dumps({"rule_files": [str(RULES)], "tests": [case]}))
    done = subprocess.run(
        [program("promtool", package="prometheus"), "test", "rules", str(tests)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


BY_MODEL = {"model_version": "ab12", "variant": "control"}
SLOW, CUT = answer(seconds=45), answer(finish_reason="length")
OTHER, FELL_BACK = answer(version="cd34"), answer(fell_back=True)
REFUSED = answer(status=400, version=None)
LEFT, LEFT_LATER = answer(status=499, version=None), answer(status=499)

# The figures of a minute, and what fires in the end.
SCENARIOS: Mapping[str, tuple[Callable[[], GatewayFigures], Alerts]] = {
    "all is well": (lambda: minute_of([(100, answer())]), {}),
    # Of 100 answers the 95th is the middle one of the ten between 30 and 60 seconds.
    "one in ten is slow": (
        lambda: minute_of([(90, answer()), (10, SLOW), (100, OTHER)]),
        {"GmpoAnswersSlow": (BY_MODEL, "one answer in twenty of ab12 takes over 45s")},
    ),
    "one in twenty-five is slow": (lambda: minute_of([(96, answer()), (4, SLOW)]), {}),
    "six in ten are cut": (
        lambda: minute_of([(40, answer()), (60, CUT), (100, OTHER)]),
        {"GmpoAnswersCut": (BY_MODEL, "60% of the answers of ab12 reach their limit")},
    ),
    "six in ten are cut, beside requests that the model's server refuses": (
        lambda: minute_of([(40, answer()), (60, CUT), (900, answer(status=400))]),
        {"GmpoAnswersCut": (BY_MODEL, "60% of the answers of ab12 reach their limit")},
    ),
    "four in ten are cut": (lambda: minute_of([(60, answer()), (40, CUT)]), {}),
    # Refused requests thin nothing out.
    "one in five is another's": (
        lambda: minute_of([(80, answer()), (20, FELL_BACK), (900, REFUSED)]),
        {"GmpoFallbacks": ({}, "20% of the answers come from a fallback")},
    ),
    "one in twenty is another's": (lambda: minute_of([(95, answer()), (5, FELL_BACK)]), {}),
    # A server that stalls: nobody is told anything before they give up.
    "all clients leave": (
        lambda: minute_of([(10, LEFT)]),
        {"GmpoClientsLeave": ({}, "100% of the clients left before their answer was whole")},
    ),
    "three in ten clients leave": (
        lambda: minute_of([(70, answer()), (20, LEFT), (10, LEFT_LATER), (900, REFUSED)]),
        {"GmpoClientsLeave": ({}, "30% of the clients left before their answer was whole")},
    ),
    "one in ten clients leaves": (lambda: minute_of([(90, answer()), (10, LEFT_LATER)]), {}),
    "one in five is turned away": (
        lambda: responses({200: 70, 400: 10, 429: 20}),
        {"GmpoTurnedAway": ({}, "20% of the requests are turned away as too many")},
    ),
    "one in twenty is turned away": (lambda: responses({200: 95, 429: 5}), {}),
    "events are written": (lambda: GatewayFigures(events=lambda: {"lost": 0, "written": 9}), {}),
    "answers are as they were": (lambda: at_level("ok"), {}),
    "answers are not as they were": (
        lambda: at_level("warning"),
        {"GmpoAnomalyWarning": (BY_MODEL, "answers of ab12 (control) are not as they were")},
    ),
    "answers are far from what they were": (
        lambda: at_level("critical"),
        {
            "GmpoAnomalyCritical": (
                BY_MODEL,
                "answers of ab12 (control) are far from what they were",
            )
        },
    ),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_what_fires_while_every_minute_is_alike(name: str, tmp_path: Path):
    figures, alerts = SCENARIOS[name]
    # A rate stands after a minute; what has to last five or fifteen is told only then.
    at_once = {one: told for one, told in alerts.items() if "for:" not in BY_NAME[one]}
    judge(series(figures()), {"3m": at_once, f"{MINUTES}m": alerts}, tmp_path)


def test_an_event_that_was_lost_is_told_for_a_quarter_of_an_hour(tmp_path: Path):
    (lost,) = [
        one
        for one in series(GatewayFigures(events=lambda: {"lost": 1}))
        if "events_total" in one["series"]
    ]
    found = [{**lost, "values": f"0x3 1x{MINUTES}"}]
    told = {"fate": "lost"}, "1 events were lost before they reached the store"
    at: Mapping[str, Alerts] = {"3m": {}, "10m": {"GmpoEventsLost": told}, "25m": {}}
    judge(found, at, tmp_path)


def test_every_rule_is_asked_when_it_fires_and_when_not():
    fires = {alert for _, alerts in SCENARIOS.values() for alert in alerts} | {"GmpoEventsLost"}
    # Failures have cases of their own.
    others = (Path(__file__).parent / "test_prometheus.py").read_text()
    assert all(name in fires or f'"{name}"' in others for name in BY_NAME)
    assert fires <= set(BY_NAME)
