"""The files in deploy/ against what a gateway exposes, and against Debian's Prometheus."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.gateways import BreakingBackend, RunningGateway, router_of, running_gateway
from tests.programs import program

from gmpo.serving.anomaly_watch import AnomalyWatch
from gmpo.serving.answer_record import AnswerRecord
from gmpo.serving.backend import AnswerReport, GenerationRequest, Usage
from gmpo.serving.breaker import BreakerRules
from gmpo.serving.figures import GatewayFigures
from gmpo.trackers.prometheus import PrometheusFile
from gmpo.trackers.tools import TrackedRun

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yml"


def answer(*, status: int = 200, version: str | None = "ab12") -> AnswerRecord:
    return AnswerRecord(
        request=GenerationRequest(id="1", route="chat", model="m", prompt="1+1=", stream=True),
        report=AnswerReport(
            backend="engine", model_version=version, quality=0.9, mean_logprob=-0.5, fell_back=True
        ),
        time=time.time(),
        status=status,
        finish_reason="stop",
        usage=Usage(prompt_tokens=5, completion_tokens=7),
        latency_seconds=1.5,
        first_token_seconds=0.2,
        error=None,
    )


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\bgmpo_\w+", text))


def test_every_metric_that_the_rules_and_the_dashboard_name_is_exposed():
    figures = GatewayFigures(events=lambda: {"lost": 0})
    figures.observe(answer())
    watch = AnomalyWatch(figures)
    watch.look()
    exposed = names_in(figures.exposition().decode())
    assert "gmpo_process_resident_memory_bytes" in exposed
    dashboard = json.loads((DEPLOY / "grafana" / "serving.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) >= len(dashboard["panels"]) > 5
    for text in (RULES.read_text(), *expressions):
        assert names_in(text)
        assert names_in(text) <= exposed


def test_a_server_with_a_version_for_each_answer_does_not_make_the_figures_grow():
    figures = GatewayFigures()
    watch = AnomalyWatch(figures)
    for number in range(2000):
        record = answer(version=f"fp_{number}")
        figures.observe(record)
        watch.observe(record)
    shown = figures.exposition().decode()
    assert len(set(re.findall(r'model_version="(\w+)"', shown))) == 64 + 1
    assert "gmpo_gateway_folded_versions_total 1936.0" in shown
    assert figures.as_dict()["folded_versions"] == 2000 - 64
    assert re.search(r'gmpo_answers_total{[^}]*model_version="other"[^}]*} 1936.0', shown)
    assert len(watch._monitor._streams) == 64 + 1  # nothing public tells of streams at rest


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def test_promtool_accepts_the_rules_and_the_configuration():
    promtool = program("promtool", package="prometheus")
    config = DEPLOY / "prometheus" / "prometheus.yml"
    done = subprocess.run(
        [promtool, "check", "config", str(config)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "9 rules found" in done.stdout


FAIL = "GmpoAnswersFail"


def series_of(per_minute: dict[tuple[int, str | None], int]) -> list[dict[str, str]]:
    """Twenty minutes of answers by status and version, under the labels that a gateway writes."""
    found = []
    for (status, version), count in per_minute.items():
        figures = GatewayFigures()
        figures.observe(answer(status=status, version=version))
        (series,) = re.findall(r"^(gmpo_answers_total{.*}) 1\.0$", shown(figures), re.MULTILINE)
        found.append({"series": series, "values": f"0+{count}x20"})
    return found


def shown(figures: GatewayFigures) -> str:
    return figures.exposition().decode()


@pytest.mark.parametrize(
    ("per_minute", "firing"),
    [
        ({(400, None): 600}, {}),
        ({(400, None): 60, (429, None): 60, (499, "ab12"): 5, (200, "ab12"): 5}, {}),
        # A flood of clients' mistakes does not hide that the engine fails.
        ({(400, None): 600, (500, None): 6}, {"none": "100%"}),
        ({(502, "ab12"): 10, (200, "ab12"): 90}, {"ab12": "10%"}),
        ({(502, "ab12"): 1, (200, "ab12"): 99, (400, None): 30}, {}),
    ],
)
def test_the_alert_of_failing_answers_counts_our_failures_and_no_clients_mistakes(
    per_minute: dict[tuple[int, str | None], int], firing: dict[str, str], tmp_path: Path
):
    promtool = program("promtool", package="prometheus")
    expected = [
        {
            "exp_labels": {"model_version": version, "variant": "none", "severity": "critical"},
            "exp_annotations": {
                "summary": f"{share} of the answers of {version} fail",
                "action": "read the errors of recent answers in the store; go back to the version "
                "before if it did not have them",
            },
        }
        for version, share in firing.items()
    ]
    told = {"eval_time": "15m", "alertname": FAIL, "exp_alerts": expected}
    case = {"interval": "1m", "input_series": series_of(per_minute), "alert_rule_test": [told]}
    tests = tmp_path / "tests.yml"
    tests.write_text(json.dumps({"rule_files": [str(RULES)], "tests": [case]}))
    done = subprocess.run(
        [promtool, "test", "rules", str(tests)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_shows_the_share_that_the_alert_watches():
    dashboard = json.loads((DEPLOY / "grafana" / "serving.json").read_text())
    (panel,) = [one for one in dashboard["panels"] if one["title"] == "Share of answers that fail"]
    (target,) = panel["targets"]
    rule = RULES.read_text().split(f"alert: {FAIL}\n")[1].split("for:")[0]
    assert " ".join(rule.split()) == f"expr: > {target['expr']} > 0.05"


@pytest.fixture
def backend() -> BreakingBackend:
    return BreakingBackend()


@pytest.fixture
def gateway(backend: BreakingBackend) -> Iterator[RunningGateway]:
    # An opened breaker would answer in the backend's place, also once that is mended.
    router = router_of(backend, BreakerRules(failures=1000))
    with running_gateway(router=router) as running:
        yield running


@pytest.fixture
def training(tmp_path: Path) -> Iterator[int]:
    """The port at which a run's tracker exposes its figures."""
    port = free_port()
    parameters = {"tracking.prometheus_port": port}
    run = TrackedRun(id="1", name="mine", project="p", folder=tmp_path, parameters=parameters)
    tool = PrometheusFile(run)
    tool.write({"kind": "round", "round": 3, "rollout/reward": 0.375})
    yield port
    tool.close()


@pytest.fixture
def prometheus(gateway: RunningGateway, training: int, tmp_path: Path) -> Iterator[str]:
    """A Prometheus with the shipped configuration and rules, impatient, at the ports of now."""
    impatient = re.sub(r"^( +for:) .*$", r"\1 0s", RULES.read_text(), flags=re.MULTILINE)
    (tmp_path / "rules.yml").write_text(impatient)
    config = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
    for shipped, here in (
        (":8000", f":{gateway.port}"),
        (":9101", f":{training}"),
        (":9093", f":{free_port()}"),
        ("scrape_interval: 15s", "scrape_interval: 500ms"),
        ("evaluation_interval: 15s", "evaluation_interval: 500ms"),
    ):
        assert config.count(shipped) == 1, shipped
        config = config.replace(shipped, here)
    (tmp_path / "prometheus.yml").write_text(config)
    port = free_port()
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [
                program("prometheus", package="prometheus"),
                f"--config.file={tmp_path / 'prometheus.yml'}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(30)


def query(prometheus: str, expression: str) -> list[dict[str, Any]]:
    try:
        answer = httpx2.get(f"{prometheus}/api/v1/query", params={"query": expression})
    except httpx2.TransportError:
        return []
    if answer.status_code == 503:  # it is still starting
        return []
    results: list[dict[str, Any]] = answer.raise_for_status().json()["data"]["result"]
    return results


def soon(prometheus: str, expression: str, *, at_least: int = 1) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 60
    while len(found := query(prometheus, expression)) < at_least:
        assert time.monotonic() < deadline, f"nothing came of {expression}"
        time.sleep(0.1)
    return found


def ask(client: httpx2.Client) -> int:
    asked = {"model": "tiny", "prompt": "2+3=", "max_tokens": 4}
    return client.post("/v1/completions", json=asked).status_code


def test_prometheus_scrapes_a_gateway_and_a_rule_fires(
    backend: BreakingBackend, gateway: RunningGateway, prometheus: str
):
    def answer_and_fail() -> None:
        with gateway.client() as client:
            backend.is_broken = False
            assert ask(client) == 200
            backend.is_broken = True
            assert ask(client) == 503

    answer_and_fail()
    assert len(soon(prometheus, "gmpo_answers_total", at_least=2)) == 2
    assert query(prometheus, 'ALERTS{alertname="GmpoAnswersFail"}') == []
    answer_and_fail()
    (alert,) = soon(prometheus, 'ALERTS{alertname="GmpoAnswersFail", alertstate="firing"}')
    assert alert["metric"]["variant"] == "none"  # the engine was gone: no model was reached
    assert alert["metric"]["severity"] == "critical"


def test_prometheus_scrapes_a_run_that_trains(prometheus: str):
    (found,) = soon(prometheus, "gmpo_training_rollout_reward")
    assert found["metric"]["job"] == "gmpo-training"
    assert found["metric"]["run"] == "mine"
    assert float(found["value"][1]) == 0.375
