"""Stores and run folders as gateways and training leave them, for the dashboard."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gmpo.abtest.assignment import assign
from gmpo.monitoring.severity import AnomalyReport, level_of
from gmpo.recipe import dump_recipe, load_recipe
from gmpo.store import AlertRow, Event, Experiment, ModelVersion, open_store


def answers(
    number: int, *, start: float, end: float, seed: int = 0, changed: float = 0.5
) -> Iterator[Event]:
    """Made-up answers at equal distances; the second version answers after the share `changed`."""
    draw = random.Random(seed)
    for place in range(number):
        share = (place + 1) / number
        version = "4337669ad7b75dc6" if share <= changed else "9b1d44f0c2e7a135"
        failed = draw.random() < 0.02
        latency = draw.lognormvariate(-0.3 if share <= changed else -0.6, 0.5)
        tokens = draw.randint(8, 60)
        payload: dict[str, Any] = {
            "route": "chat",
            "status": 504 if failed else 200,
            "finish_reason": None if failed else draw.choice(["stop", "stop", "stop", "length"]),
            "prompt_tokens": 44,
            "completion_tokens": None if failed else tokens,
            "latency_s": latency,
            "first_token_s": None,
            "tokens_per_s": None if failed else tokens / latency,
            "quality": None if failed else draw.betavariate(9, 2),
            "mean_logprob": None if failed else -draw.gammavariate(4, 0.08),
            "fell_back": draw.random() < 0.01,
            "fallback_reason": "timeout",
            "error": "no answer within 600 seconds" if failed else None,
        }
        yield Event(
            kind="answer",
            time=start + share * (end - start),
            payload=payload,
            model_version=version,
            request_id=f"chatcmpl-{place:06d}",
        )


def outcomes(events: list[Event], *, every: int = 3, seed: int = 1) -> Iterator[Event]:
    """Every third answer is judged; the second version does better."""
    draw = random.Random(seed)
    for event in events[::every]:
        rate = 0.71 if event.model_version == "4337669ad7b75dc6" else 0.83
        success = int(event.payload["status"] == 200 and draw.random() < rate)
        yield Event(
            kind="outcome",
            time=event.time,
            payload={"success": success, "quality": event.payload["quality"]},
            request_id=event.request_id,
            model_version=event.model_version,
        )


def fill(path: Path | str, events: list[Event]) -> str:
    """A store of these events; its URL."""
    with open_store(str(path)) as store:
        for begin in range(0, len(events), 20_000):
            store.add_events(events[begin : begin + 20_000])
    return str(path)


def write_run(folder: Path, *, rounds: int = 40, seed: int = 0) -> Path:
    """A run folder with the lines of so many rounds, and rollouts of each."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    metrics, rollouts = [], []
    for number in range(1, rounds + 1):
        learned = 1 - math.exp(-number / (10 + 5 * seed))
        spread = 0.05 + 0.1 * draw.random()
        metrics.append(
            {
                "kind": "round",
                "round": number,
                "step": 4 * number,
                "rollout/reward": 0.1 + 0.75 * learned + draw.gauss(0, 0.03),
                "ratio/min": math.exp(-6 * spread),
                "ratio/max": math.exp(5 * spread),
                "ratio/am_gm_gap": spread**2 / 2,
                "update/gradient_norm": draw.lognormvariate(1, 0.3),
                "time/tokens_per_second": 450 + draw.gauss(0, 12),
                "time/rollout_seconds": 3.4,
                "time/update_seconds": 9.1,
            }
        )
        if number % 5 == 0:
            accuracy = 0.3 + 0.45 * learned + draw.gauss(0, 0.02)
            metrics.append({"kind": "evaluation", "round": number, "evaluation/accuracy": accuracy})
        rollouts.append(
            {
                "round": number,
                "rollouts": [
                    {"ratio": {"sequence": math.exp(draw.gauss(0, spread))}} for _ in range(16)
                ],
            }
        )
    for name, lines in (("metrics.jsonl", metrics), ("rollouts.jsonl", rollouts)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / name).write_text(text, encoding="utf-8")
    recipe = dump_recipe(load_recipe("quickstart"))
    (folder / "recipe.toml").write_text(recipe, encoding="utf-8")
    return folder


PLAN: dict[str, Any] = {
    "salt": "0123456789abcdef",
    "models": {"control": "quickstart-1", "candidate": "quickstart-2"},
    "weights": {"control": 0.5, "candidate": 0.5},
    "primary": "success",
    "guardrails": [{"metric": "latency_p95", "margin": 0.5}],
    "tuned_for": 600,
    "max_units": 5000,
}


def add_experiment(url: str, name: str, *, units: int, start: float, end: float) -> None:
    """An experiment with units that ask once each; the candidate does better."""
    draw = random.Random(3)
    events = []
    for place in range(units):
        unit = f"user-{place}"
        arm = assign(name, PLAN["salt"], unit, PLAN["weights"])
        time = start + (place + 1) / units * (end - start)
        about = {"experiment": name, "unit": unit, "request_id": f"{name}-{place}"}
        payload = {"variant": arm, "weight": 0.5}
        events.append(Event(kind="exposure", time=time - 0.5, payload=payload, **about))
        success = int(draw.random() < (0.82 if arm == "candidate" else 0.71))
        payload = {
            "variant": arm,
            "success": success,
            "quality": None,
            "latency_s": draw.lognormvariate(-0.4, 0.4),
        }
        events.append(Event(kind="outcome", time=time, payload=payload, **about))
    with open_store(url) as store:
        begun = Experiment(name=name, created=start, status="running", config=PLAN)
        store.put_experiment(begun, expected=None)
        store.add_events(events)


def add_versions(url: str, *, first: float, second: float) -> None:
    """Two registered versions of one model, the second one champion after the first."""
    one, two = "4337669ad7b75dc6", "9b1d44f0c2e7a135"
    with open_store(url) as store:
        for version, parent, created in ((one, None, first), (two, one, second)):
            store.put_model_version(
                ModelVersion(
                    version=version,
                    created=created,
                    name="support-bot",
                    path=f"runs/support/{version}",
                    parent=parent,
                    lineage={},
                    metrics={"svamp": 0.41 if parent is None else 0.47},
                )
            )
        store.set_champion("support-bot", expected=None, version=one, reason={"by": "hand"})
        store.set_champion("support-bot", expected=one, version=two, reason={"gate": "promote"})
        swap = {"previous": one, "version": two, "seconds": 1.5}
        store.add_events([Event(kind="swap", time=second, payload=swap, model_version=two)])


def add_trouble(url: str, *, start: float, end: float) -> None:
    """An alert that fires, one that is over, and anomaly reports."""
    rows = [
        AlertRow(
            fingerprint=f"{place:016x}",
            status="resolved" if over else "firing",
            severity="warning" if over else "critical",
            starts_at=start,
            ends_at=end if over else None,
            payload={
                "labels": {"alertname": name},
                "annotations": {"summary": f"{name} since a while", "action": "look at the log"},
            },
        )
        for place, (name, over) in enumerate([("GmpoSlowAnswers", True), ("GmpoLowQuality", False)])
    ]
    events = []
    for minute in range(30):
        score = max(0.0, min(1.0, (minute - 10) / 15))
        severity = 0.9 * score
        report = AnomalyReport(
            severity=severity,
            level=level_of(severity),
            families={"performance": {"success_rate": score, "answer_quality": 0.75 * score}},
            signals={},
            recommended_actions=["roll back"] if severity > 0.4 else [],
        )
        time = start + minute / 30 * (end - start)
        events.append(
            Event(
                kind="anomaly",
                time=time,
                payload=report.payload(),
                model_version="9b1d44f0c2e7a135",
            )
        )
    with open_store(url) as store:
        for row in rows:
            store.put_alert(row)
        store.add_events(events)
