"""The load benchmark on a tiny model: every figure is there, and the answers are the sampler's."""

from __future__ import annotations

import json
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from select import select
from urllib.parse import urlsplit

import numpy as np
import pytest
from benchmarks.differences import Difference, quantile_difference, quantile_of_differences
from benchmarks.load import main
from benchmarks.load_clients import tokens_per_second
from benchmarks.upstream_latency import (
    WARM_UP,
    as_the_gateway_asks,
    report_upstream,
    seconds_of_answer,
    times_in_turns,
)
from benchmarks.upstream_latency import main as measure_upstream
from tests.gateways import running_gateway
from tests.models import save_tiny
from tests.upstreams import Body, Reply, running_upstream, says

from gmpo.serving.upstream import UpstreamBackend, UpstreamSettings


def test_a_short_load_is_measured_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder, out = save_tiny(tmp_path / "tiny"), tmp_path / "out" / "load.json"
    main(
        [
            *("--model", folder, "--dtype", "fp32", "--clients", "4", "--seconds", "2"),
            *("--overload-seconds", "2"),
            *("--rows", "4", "--max-tokens", "8", "--prompts", "6", "--latency-pairs", "5"),
            *("--upstream-pairs", "6", "--upstream-tokens", "3"),
            *("--json", str(out), "--threads", "1"),
        ]
    )
    figures = json.loads(out.read_text())
    assert figures["answers"] >= 8
    assert figures["answered_200"] == 1 and figures["answered_429"] == 0
    served = figures["served"]
    assert served["num_equal"] == served["num_compared"] == figures["answers"]
    assert served["num_mixed_up"] == 0
    assert served["tokens_per_second"] > 0 and min(figures["offline_tokens_per_second"]) > 0
    assert 0 < figures["goodput"] < 1.5
    overloaded = figures["overloaded"]
    assert set(overloaded["statuses"]) == {"200", "429"}, "one runs, one waits, two are too many"
    assert overloaded["num_equal"] == overloaded["num_compared"] == overloaded["statuses"]["200"]
    added = figures["added_milliseconds"]
    assert added["pairs"] == 5
    for name in ("p50", "p99", "engine_p99"):
        assert added[name]["low"] <= added[name]["high"]
    upstream = figures["added_to_upstream_milliseconds"]
    assert (upstream["pairs"], upstream["max_tokens"], upstream["server_threads"]) == (6, 3, 1)
    assert upstream["direct_p50"] > 0
    differences = [name for name, value in upstream.items() if isinstance(value, dict)]
    assert len(differences) == 13
    for name in differences:
        assert upstream[name]["low"] <= upstream[name]["high"]
    printed = capsys.readouterr().out
    assert "with room for half of the clients" in printed
    assert "goodput" in printed and "100.0% with 200" in printed
    assert "the engine asked twice differs from itself by" in printed
    assert report_upstream(upstream) in printed


def test_tokens_a_second_are_of_what_was_whole_in_time_over_the_time_of_the_last():
    def answer(ended: float, *, tokens: int = 0, status: int = 200) -> dict[str, float]:
        return {"status": status, "ended": ended, **({"tokens": tokens} if status == 200 else {})}

    answers = [answer(1.0, tokens=10), answer(2.5, tokens=20), answer(2.8, status=429)]
    # (10 + 20) / 2.5: what was not whole after 3 s brings neither tokens nor time.
    assert tokens_per_second([*answers, answer(4.0, tokens=30)], 3.0) == 12
    # All that there is came late: 30 / 4.
    assert tokens_per_second([answer(4.0, tokens=30), answer(0.1, status=429)], 3.0) == 7.5
    assert tokens_per_second([answer(0.1, status=429)], 3.0) == 0


def test_each_turn_asks_every_server_for_the_same_and_knows_its_seconds():
    asked = {"model": "m", "prompt": "1 + 1 =", "max_tokens": 2}
    other = {**asked, "stream": True}
    with running_upstream(says("2")) as quick, running_upstream(says("2", seconds=0.2)) as slow:
        times = times_in_turns([(quick.url, asked), (slow.url, asked), (quick.url, other)], 3)
        assert slow.bodies == (3 + WARM_UP) * [asked]
        turns = [quick.bodies[place : place + 2] for place in range(0, len(quick.bodies), 2)]
        assert len(turns) == 3 + WARM_UP
        assert all(turn in ([asked, other], [other, asked]) for turn in turns)
        assert turns.count([asked, other]) not in (0, len(turns)), "not in one order alone"
    assert times.shape == (3, 3)
    assert times[:, 1].min() >= 0.2
    assert np.median(times[:, [0, 2]]) < 0.2


def test_the_server_is_asked_directly_as_the_gateway_asks_it():
    plain = {"model": "bot", "prompt": "1 + 1 =", "max_tokens": 2, "temperature": 0.0}
    with running_upstream(says("2")) as server:
        settings = UpstreamSettings(url=server.url, model="bot")
        with running_gateway(lambda: UpstreamBackend("bot", settings)) as gateway:
            times_in_turns(
                [(f"{gateway.url}/v1", plain), (server.url, as_the_gateway_asks(plain))], 1
            )
        assert len(server.bodies) == 2 * (1 + WARM_UP)
        assert all(body == as_the_gateway_asks(plain) for body in server.bodies)


def test_the_upstream_part_can_be_measured_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "upstream.json"
    measure_upstream(
        [
            *("--model", save_tiny(tmp_path / "tiny"), "--dtype", "fp32", "--threads", "1"),
            *("--pairs", "3", "--tokens", "2", "--json", str(out)),
        ]
    )
    figures = json.loads(out.read_text())
    assert (figures["pairs"], figures["max_tokens"]) == (3, 2)
    assert figures["circumstances"]["commit"]
    # Medians of the same turns: what the stream adds and what the gateway adds to it make the sum.
    parts = figures["stream_p50"]["value"] + figures["beyond_stream_p50"]["value"]
    assert parts == pytest.approx(figures["p50"]["value"])
    assert report_upstream(figures) in capsys.readouterr().out


def test_what_a_gateway_adds_to_a_server_without_a_model_is_told_as_such(tmp_path: Path):
    out = tmp_path / "paced.json"
    measure_upstream(
        ["--paced", "2", "--pairs", "3", "--tokens", "4", "--threads", "1", "--json", str(out)]
    )
    figures = json.loads(out.read_text())
    assert (figures["paced_milliseconds"], figures["server_threads"]) == (2, 0)
    assert "model" not in figures
    assert figures["direct_p50"] >= 8, "four tokens, each 2 ms after the one before"
    assert figures["p50"]["value"] > 0


@pytest.mark.parametrize("pace", ["0", "-1", "nan", "1001"])
def test_a_pace_that_no_server_keeps_is_refused(pace: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as raised:
        measure_upstream(["--paced", pace])
    assert raised.value.code == 2
    assert f"--paced is {pace}; above 0 and at most 1000 is needed" in capsys.readouterr().err


def test_a_connection_that_a_server_ended_meanwhile_is_opened_again():
    answers = says("2")

    async def answers_once(reply: Reply, body: Body) -> None:
        await answers(reply, body)
        reply.close()

    with running_upstream(answers_once) as server:
        address = urlsplit(server.url)
        with closing(HTTPConnection(address.hostname or "", address.port)) as connection:
            for asked in ({"prompt": "1"}, {"prompt": "2"}):
                assert seconds_of_answer(connection, "/v1/completions", asked) > 0
                assert select([connection.sock], [], [], 10)[0]  # the server's end has come
        assert [body["prompt"] for body in server.bodies] == ["1", "2"]


def test_a_difference_of_quantiles_by_hand():
    # Medians 2 and 5; each pair is 3 apart, so that every drawn sample's medians are too.
    less = np.array([1.0, 2.0, 9.0])
    assert quantile_difference(less, less + 3, 0.5) == Difference(value=3, low=3, high=3)
    # One pair of 100 is the tail: a third of the draws miss it, a quarter have it twice or more.
    more = np.concatenate([np.full(99, 1.0), [101.0]])
    found = quantile_difference(np.full(100, 1.0), more, 0.99)
    # Rank 0.99 x 99 = 98.01 of 0..99: 0.01 of the way from 1 to 101 is 2, less 1.
    assert found.value == pytest.approx(1) and found.low == 0 and found.high == pytest.approx(100)


def test_a_quantile_of_differences_is_that_of_pairs_and_not_a_difference_of_quantiles():
    less = np.array([1.0, 2.0, 9.0])
    more = np.array([10.0, 3.0, 10.0])
    # Longer by 9, 1 and 1; the medians are 2 and 10.
    assert quantile_of_differences(less, more, 0.5).value == 1
    assert quantile_difference(less, more, 0.5).value == 8
    found = quantile_of_differences(less, less + 3, 0.99)
    assert found == Difference(value=3, low=3, high=3)


def test_counts_below_one_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as raised:
        main(["--clients", "0"])
    assert raised.value.code == 2
    assert "--clients is 0; at least 1 is needed" in capsys.readouterr().err
