"""From exposures and outcomes to a decision, by hand and against the simulation's arithmetic."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scripts.abtest_simulation import EFFECTS, crossings, rate

from gmpo.abtest.analysis import analyse, analyse_records
from gmpo.abtest.decision import Decision, Evidence, decide
from gmpo.abtest.plan import plan_of
from gmpo.abtest.records import Exposure, Outcome, read_records
from gmpo.abtest.report import ExperimentReport
from gmpo.abtest.sequences import Interval
from gmpo.abtest.wording import effect_words
from gmpo.abtest_report import judgement_lines, metric_rows, render_experiment
from gmpo.errors import ConfigError
from gmpo.store import Event, Experiment

RESULTS = Path(__file__).parents[2] / "docs/results"
CONFIG: dict[str, Any] = {
    "salt": "s",
    "models": {"control": "old", "candidate": "new"},
    "weights": {"control": 0.5, "candidate": 0.5},
    "tuned_for": 400,
    "max_units": 5000,
}


def experiment(**changes: Any) -> Experiment:
    return Experiment(name="e", created=0.0, status="running", config={**CONFIG, **changes})


def traffic(
    rates: tuple[float, float], *, units: int = 400, seed: int = 0, seconds: tuple = (1.0, 1.0)
) -> tuple[list[Exposure], list[Outcome]]:
    """Units that alternate between the arms and ask once each."""
    rng = np.random.default_rng(seed)
    exposures, outcomes = [], []
    for number in range(units):
        arm = number % 2
        name = ("control", "candidate")[arm]
        unit = f"u{number}"
        exposures.append(Exposure(time=float(number), unit=unit, variant=name, weight=0.5))
        outcomes.append(
            Outcome(
                time=number + 0.5,
                unit=unit,
                success=int(rng.random() < rates[arm]),
                quality=None,
                latency_seconds=float(seconds[arm] * math.exp(rng.normal(0, 0.3))),
                request_id=f"r{number}",
            )
        )
    return exposures, outcomes


def shown(report: ExperimentReport, *, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as captured:
        console.print(render_experiment(report))
    return captured.get()


def test_nothing_keeps_running_of_an_experiment_that_was_stopped():
    stopped = replace(experiment(), status="stopped")
    undecided = traffic((0.6, 0.6))
    assert analyse(experiment(), *undecided).recommendation.startswith("Keep running: success")
    assert analyse(stopped, *undecided).recommendation.startswith("Undecided: success rate may")
    guarded = {"guardrails": [{"metric": "latency", "margin": 0.05}], "guardrails_proven": True}
    open_one = replace(experiment(**guarded), status="stopped")
    told = analyse(open_one, *traffic((0.4, 0.8))).recommendation
    assert told.startswith("Undecided: success rate is better") and "not yet shown safe" in told
    # What it shows holds all the same.
    assert analyse(stopped, *traffic((0.4, 0.8))).recommendation.startswith("Promote the cand")


def test_a_report_is_whole_in_eighty_columns():
    guarded = [{"metric": "latency_p95", "margin": 0.025}, {"metric": "quality", "margin": 0.025}]
    report = analyse(experiment(guardrails=guarded), *traffic((0.4, 0.8), seconds=(1.0, 3.0)))
    many = [
        replace(one, control=replace(one.control, num_units=1_234_567))
        for one in (report.primary, *report.guardrails)
    ]
    report = replace(report, primary=many[0], guardrails=tuple(many[1:]))
    told = [shown(report, width=width).split("\nat ")[1] for width in (80, 300)]
    narrow, wide = ([line.rstrip() for line in one.splitlines()] for one in told)
    of_table = narrow.index(next(line for line in narrow if line.startswith("note:")))
    assert narrow[:of_table] == wide[:of_table] and of_table > 12
    assert "1234567 units" in told[0] and "margin 2.5 points" in told[0]


def test_an_end_that_is_open_is_infinite_and_what_is_not_known_is_unknown():
    guarded = [{"metric": "latency", "margin": 0.1}, {"metric": "quality", "margin": 0.1}]
    report = analyse(experiment(guardrails=guarded), *traffic((0.4, 0.8)))
    latency, quality = report.guardrails
    ends = Interval(low=0.9, high=math.inf), Interval(low=-math.inf, high=math.inf)
    report = replace(
        report,
        guardrails=(
            replace(latency, interval=ends[0]),
            replace(quality, interval=ends[1], estimate=math.nan),
        ),
    )
    _, of_latency, of_quality = metric_rows(report)
    assert of_latency[5] == "-10.00 % to ∞"
    assert of_quality[4:6] == ["unknown", "-∞ to ∞"]
    assert "-10.00 to ∞" in shown(report, width=80)
    assert "no bound to no bound" in effect_words(report.guardrails[1])


def test_a_clear_gain_is_promoted_and_a_clear_loss_rolled_back():
    better = analyse(experiment(), *traffic((0.4, 0.8)))
    assert better.decision == Decision(action="promote", rule="primary_better")
    assert better.recommendation.startswith("Promote the candidate (new): success rate is better")
    assert better.primary.exact is not None
    assert len(better.path) > 10
    assert better.path[-1].num_units == 400
    worse = analyse(experiment(), *traffic((0.8, 0.4)))
    assert (worse.decision.action, worse.decision.rule) == ("roll_back", "primary_worse")
    alike = analyse(experiment(), *traffic((0.6, 0.6)))
    assert alike.decision.action == "keep_running"
    ended = analyse(experiment(max_units=400), *traffic((0.6, 0.6)))
    assert ended.decision.rule == "all_units_seen"
    timed = analyse(experiment(end_after_hours=0.1), *traffic((0.6, 0.6)))
    assert timed.decision.rule == "time_is_up"
    # After the end nothing is split, so a later look finds no longer time.
    later = analyse(experiment(end_after_hours=0.1), *traffic((0.6, 0.6)), now=1e6)
    assert later.hours == 0.1
    assert (later.decision, later.primary) == (timed.decision, timed.primary)
    assert "0.1 hours of traffic do not show a whole week" in later.warnings
    won = analyse(experiment(end_after_hours=0.1), *traffic((0.4, 0.8)), now=1e6)
    assert won.decision.action == "promote", "an end takes nothing from what was shown"


def test_a_burn_in_judges_nothing():
    early = analyse(experiment(), *traffic((0.0, 1.0), units=80))
    assert early.primary.interval is None
    assert early.primary.state == "unclear"
    assert "not judged yet, with 40 and 40 units" in early.recommendation


def test_guardrails_are_judged_within_their_margin():
    plan = {"guardrails": [{"metric": "latency", "margin": 0.1}]}
    slow = analyse(experiment(**plan), *traffic((0.4, 0.8), seconds=(1.0, 2.0)))
    assert (slow.decision.action, slow.decision.because) == ("roll_back", ("latency",))
    assert slow.guardrails[0].estimate == pytest.approx(2.0, rel=0.15)
    assert slow.guardrails[0].alpha == 0.05
    fast = analyse(experiment(**plan), *traffic((0.4, 0.8), seconds=(1.0, 0.7)))
    assert fast.guardrails[0].state == "safe"
    assert fast.decision.action == "promote"
    tight = {"guardrails": [{"metric": "latency", "margin": 0.001}]}
    proven = {**tight, "guardrails_proven": True}
    open_one = analyse(experiment(**proven), *traffic((0.4, 0.8)))
    assert open_one.guardrails[0].state == "unclear"
    assert open_one.decision.rule == "guardrails_open"
    tail = {"guardrails": [{"metric": "latency_p95", "margin": 0.1}]}
    slow_tail = analyse(experiment(**tail), *traffic((0.5, 0.5), units=4000, seconds=(1.0, 2.0)))
    assert slow_tail.guardrails[0].state == "harmed"


def test_wrong_shares_block_every_decision():
    exposures, outcomes = traffic((0.1, 0.9), units=4000)
    kept = [e for e in exposures if e.variant == "control" or int(e.unit[1:]) % 4 == 1]
    names = {e.unit for e in kept}
    found = analyse(experiment(), kept, [o for o in outcomes if o.unit in names])
    assert found.decision == Decision(action="blocked", rule="ratio_mismatch")
    assert "Decide nothing" in found.recommendation


@pytest.mark.parametrize(("num_later", "is_blocked"), [(0, False), (1, False), (3, True)])
def test_an_arm_whose_model_changed_blocks_every_decision(num_later: int, is_blocked: bool):
    exposures, outcomes = traffic((0.3, 0.7))  # 200 units an arm
    answered = [
        replace(one, served_variant=exposure.variant, model_version=f"{exposure.variant}-1")
        for exposure, one in zip(exposures, outcomes, strict=True)
    ]
    for place in range(1, 2 * num_later, 2):
        answered[place] = replace(answered[place], model_version="candidate-2")
    # The other arm's model after a fallback, and what nobody answered, are no change of this one.
    answered[-1] = replace(answered[-1], served_variant="control", model_version="control-1")
    answered[-3] = replace(answered[-3], latency_seconds=None, model_version="unknown")
    found = analyse(experiment(), exposures, answered)
    assert found.versions["control"] == {"control-1": 200}
    assert sum(found.versions["candidate"].values()) == 198
    told = [one for one in found.warnings if "candidate was answered by 2 model versions" in one]
    assert len(told) == (1 if num_later else 0)
    assert (found.decision.rule == "versions_changed") == is_blocked
    assert found.decision.action == ("blocked" if is_blocked else "promote")
    assert ("an arm's model changed meanwhile" in found.recommendation) == is_blocked
    before = analyse(experiment(), exposures, answered, now=0.6)
    assert before.versions == {"control": {"control-1": 1}, "candidate": {}}


def test_the_unit_counts_where_it_was_assigned_whoever_served_it():
    exposures, outcomes = traffic((0.5, 0.5))
    # Later exposures to the other arm, and outcomes of strangers, change nothing but the counts.
    moved = [replace(exposures[0], time=999.0, variant="candidate")]
    strangers = [replace(outcomes[0], unit="nobody", request_id="x")]
    plain = analyse(experiment(), exposures, outcomes)
    odd = analyse(experiment(), exposures + moved, outcomes + strangers, now=plain.time)
    assert odd.primary == plain.primary
    assert odd.counts["requests_of_units_never_exposed"] == 1
    assert "moved_units" in odd.counts


def test_a_request_that_was_never_answered_is_a_failure():
    exposures, outcomes = traffic((1.0, 1.0))
    answered = [one for one in outcomes if int(one.unit[1:]) % 4 != 1]  # half of the candidate's
    found = analyse(experiment(), exposures, answered, now=10_000.0)
    assert found.counts["unanswered_units"] == 100
    assert found.primary.candidate.value == pytest.approx(0.5)
    assert found.decision.action == "roll_back"


def test_units_under_other_weights_are_left_out():
    exposures, outcomes = traffic((0.5, 0.5))
    early = [replace(e, weight=0.1) if int(e.unit[1:]) < 100 else e for e in exposures]
    found = analyse(experiment(), early, outcomes)
    assert found.num_units == 300
    assert found.counts["units_under_other_weights"] == 100
    assert found.counts["requests_of_left_out_units"] == 100


def test_a_trend_over_time_and_changed_shares_make_no_difference_of_the_arms():
    # Both arms alike; all become better when the candidate's share goes from 10 to 50 %.
    rng = np.random.default_rng(0)
    exposures, outcomes = [], []
    for number in range(4000):
        late = number >= 2000
        weight = 0.5 if late else 0.1
        arm = "candidate" if rng.random() < weight else "control"
        share = weight if arm == "candidate" else 1 - weight
        unit = f"u{number}"
        exposures.append(Exposure(time=float(number), unit=unit, variant=arm, weight=share))
        success = int(rng.random() < (0.9 if late else 0.3))
        outcomes.append(
            Outcome(time=number + 0.5, unit=unit, success=success, quality=None, latency_seconds=1)
        )
    changed = experiment(weights_since=2000.0)
    found = analyse(changed, exposures, outcomes, now=4000.0)
    assert found.num_units == 2000 and not found.ratio.alarm
    assert found.primary.state == "unclear" and found.decision.action == "keep_running"
    # 2,000 s are counted, and the warning about a whole week is about those.
    assert any(one.startswith("0.6 hours of traffic") for one in found.warnings)
    pooled = [replace(one, weight=0.5) for one in exposures]
    assert analyse(experiment(), pooled, outcomes, now=4000.0).primary.state == "better"


def test_back_at_an_earlier_share_its_units_count_no_more_and_are_not_said_to():
    # Under 30 % in between, the candidate's first units had the control, which answers nothing.
    exposures, outcomes = traffic((0.0, 1.0), units=200)
    between = [
        replace(one, time=1000.0 + one.time, variant="control", weight=0.7)
        for one in exposures
        if one.variant == "candidate"
    ]
    failed = [
        replace(one, time=1000.5 + one.time, success=0) for one in outcomes if int(one.unit[1:]) % 2
    ]
    late, answered = traffic((0.0, 1.0), units=200)
    late = [replace(one, time=3000.0 + one.time, unit=f"late {one.unit}") for one in late]
    answered = [replace(one, time=3000.0 + one.time, unit=f"late {one.unit}") for one in answered]
    found = analyse(
        experiment(weights_since=2000.0),
        [*exposures, *between, *late],
        [*outcomes, *failed, *answered],
        now=4000.0,
    )
    assert found.num_units == found.counts["units_under_other_weights"] == 200
    assert found.primary.candidate.value == 1
    assert "moved_units" not in found.counts


def test_the_hours_counted_begin_with_the_present_shares_and_end_with_the_experiment():
    exposures, outcomes = traffic((0.5, 0.5))
    week = experiment(end_after_hours=200.0, weights_since=196 * 3600.0)
    for now in (200 * 3600.0, 400 * 3600.0):
        found = analyse(week, exposures, outcomes, now=now)
        assert any(one.startswith("4.0 hours of traffic") for one in found.warnings)


@pytest.mark.parametrize(
    ("evidence", "action"),
    [
        ({"ratio_alarm": True, "primary": "better"}, "blocked"),
        ({"versions_alarm": True, "guardrails": {"latency": "harmed"}}, "blocked"),
        ({"primary": "better", "guardrails": {"latency": "harmed"}}, "roll_back"),
        ({"primary": "worse", "guardrails": {"latency": "safe"}}, "roll_back"),
        ({"primary": "better", "guardrails": {"latency": "unclear"}}, "promote"),
        ({"primary": "unclear", "num_units": 5000}, "stop_for_futility"),
        ({"primary": "unclear"}, "keep_running"),
    ],
)
def test_the_table_of_decisions(evidence, action):
    settings = {
        "ratio_alarm": False,
        "versions_alarm": False,
        "primary": "unclear",
        "guardrails": {},
        "num_units": 10,
        "hours": 1.0,
        **evidence,
    }
    assert decide(Evidence(**settings), plan=plan_of(CONFIG)).action == action


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alpah": 0.1}, "alpha"),
        ({"weights": {"control": 0.5, "candidate": 0.6}}, "weights"),
        ({"weights": {"control": 1.0, "candidate": 0.0}}, "an arm without units"),
        ({"models": {"control": "a", "candidate": "a"}}, "both arms are 'a'"),
        ({"models": {"a": "x", "b": "y"}}, "must name"),
        ({"guardrails": [{"metric": "success", "margin": 0.1}]}, "judged twice"),
        ({"guardrails": [{"metric": "latency", "margin": -1}]}, "margin"),
        ({"alpha": 0.9}, "alpha"),
    ],
)
def test_a_wrong_plan_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        plan_of({**CONFIG, **changes})


def events() -> list[Event]:
    return [
        Event(kind="exposure", time=1.0, unit="u", payload={"variant": "control", "weight": 0.5}),
        Event(
            kind="outcome",
            time=2.0,
            unit="u",
            request_id="r",
            payload={"variant": "control", "success": None, "quality": 0.4, "latency_s": 2.0},
        ),
        Event(kind="outcome", time=3.0, unit="u", request_id="r", payload={"success": 1}),
        Event(
            kind="shadow", time=2.5, unit="u", request_id="r",
            payload={"variant": "candidate", "quality": 0.6, "latency_s": 1.0},
        ),
        Event(kind="shadow", time=2.5, request_id="lost", payload={"quality": 0.6}),
        Event(kind="outcome", time=4.0, unit="u", payload={"success": 3}),
        Event(kind="exposure", time=4.0, unit="u", payload={"variant": "", "weight": 0.5}),
    ]  # fmt: skip


def test_events_become_records_and_what_cannot_be_read_is_counted():
    found = read_records(events())
    assert len(found.exposures) == 1
    (outcome,) = found.outcomes
    assert (outcome.time, outcome.success, outcome.quality, outcome.latency_seconds) == (
        2.0, 1, 0.4, 2.0,
    )  # fmt: skip
    (pair,) = found.shadow_pairs
    assert (pair.served_quality, pair.shadow_quality) == (0.4, 0.6)
    assert found.counts == {"malformed_events": 2, "merged_outcomes": 1, "unpaired_shadows": 1}
    report = analyse_records(experiment(), found)
    assert {result.metric for result in report.shadow} == {"quality", "latency"}
    assert json.loads(json.dumps(report.as_dict()))["counts"]["malformed_events"] == 2


@pytest.mark.parametrize("kind", ["rare", "frequent", "latency", "sessions"])
def test_looking_all_the_time_seldom_errs_where_a_fixed_test_often_does(kind):
    found = crossings(kind, effect=0.0, simulations=300, units=2000)
    assert rate(found.sequence)["share"] <= 0.06
    assert rate(found.fixed)["share"] > 0.2
    if kind == "sessions":
        assert rate(found.by_request)["share"] > 0.06


def test_the_stored_simulations_keep_their_bounds():
    stored = json.loads((RESULTS / "abtest.json").read_text())
    assert stored["simulations"] == 4000
    for kind, effect in EFFECTS.items():
        assert stored[kind]["sequence"]["high_95"] <= 0.06
        assert stored[kind]["fixed"]["share"] > 0.4, "what the sequence is there for"
        assert stored[f"{kind} {effect:+g}"]["power"] > 0.7
    frequent = stored["frequent +0.08"]
    assert 700 <= frequent["median_units"] <= 1000
    assert frequent["power_by_4000_units"] > 0.99


def test_the_simulation_computes_what_the_analysis_does():
    """One experiment of sessions through both: the same estimate and error at the last look."""
    from scripts import abtest_simulation as simulation

    rng = np.random.default_rng(5)
    control, candidate = (
        simulation.draw("sessions", shift, rng, size=1, units=120) for shift in (0.0, 0.1)
    )
    exposures, outcomes = [], []
    for place in range(120):
        for arm, (sums, _, counts) in enumerate((control, candidate)):
            name, unit = ("control", "candidate")[arm], f"{arm}-{place}"
            now = float(2 * place + arm)
            exposures.append(Exposure(time=now, unit=unit, variant=name, weight=0.5))
            for request in range(int(counts[0, place])):
                outcomes.append(
                    Outcome(
                        time=now + 0.1, unit=unit, success=int(request < sums[0, place]),
                        quality=None, latency_seconds=1.0,
                    )
                )  # fmt: skip
    report = analyse(experiment(tuned_for=1000), exposures, outcomes)
    looks = np.array([119])
    means = [a[0].sum() / a[2].sum() for a in (control, candidate)]
    variance = sum(
        simulation._variance(a[0], a[2], looks, np.array([[mean]]))[0, 0]
        for a, mean in zip((control, candidate), means, strict=True)
    )
    assert report.primary.estimate == pytest.approx(means[1] - means[0])
    half = math.sqrt(variance) * simulation.boundary(240, alpha=0.05, tuned_for=1000)
    assert report.primary.interval is not None
    assert report.primary.interval.high - report.primary.estimate == pytest.approx(half, rel=1e-9)


def test_what_successes_come_from_is_counted_by_arm_and_presumed_ones_are_told():
    exposures, outcomes = traffic((0.5, 0.5), units=40)

    def judged(number: int, outcome: Outcome) -> Outcome:
        if number % 2 and number < 9:  # 4 of the candidate's 20
            return replace(outcome, success=1, judged_by="presumed")
        if number % 2:
            return replace(outcome, judged_by="verifier")
        if number == 0:
            return replace(outcome, success=None)
        return replace(outcome, judged_by="feedback" if number < 9 else None)

    named = [judged(number, outcome) for number, outcome in enumerate(outcomes)]
    found = analyse(experiment(), exposures, named)
    assert found.judgements == {
        "control": {"feedback": 4, "unknown": 15},
        "candidate": {"verifier": 16, "presumed": 4},
    }
    assert judgement_lines(found) == [
        "control comes from feedback 4, unknown 15",
        "candidate comes from verifier 16, presumed 4",
    ]
    (told,) = [one for one in found.warnings if "nobody judged" in one]
    assert told.startswith("0 % of control's and 20 % of candidate's judged requests")
    assert all(way in told for way in ("quality.verify", "serve --task", "quality.task"))
    # An experiment on latency does not ask what is right.
    latency = analyse(experiment(primary="latency"), exposures, named)
    assert not any("nobody judged" in one for one in latency.warnings)
    assert latency.judgements == found.judgements
    early = analyse(experiment(), exposures, named, now=4.0)
    assert early.judgements["candidate"] == {"presumed": 2}


def test_later_knowledge_of_a_request_brings_its_judge_along():
    def outcome(time: float, **payload: Any) -> Event:
        return Event(kind="outcome", time=time, unit="u", request_id="r", payload=payload)

    presumed = outcome(1.0, success=1, judged_by="presumed")
    (kept,) = read_records([presumed, outcome(2.0, success=None, quality=0.5)]).outcomes
    assert (kept.success, kept.judged_by, kept.quality) == (1, "presumed", 0.5)
    (told,) = read_records([presumed, outcome(2.0, success=0, judged_by="feedback")]).outcomes
    assert (told.success, told.judged_by) == (0, "feedback")
    # An outcome of before, which does not say what judged it, says nothing of it here either.
    (unknown,) = read_records([presumed, outcome(2.0, success=0)]).outcomes
    assert unknown.judged_by is None
    assert read_records([outcome(1.0, success=1, judged_by="me")]).counts["malformed_events"] == 1
