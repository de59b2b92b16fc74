"""When alerts fire, are told again and end; every time below is chosen by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmpo.errors import ConfigError
from gmpo.monitoring.alerts import (
    Alert,
    AlertTimes,
    Condition,
    Notification,
    Now,
    Severity,
    advance,
    fingerprint,
)

TIMES = AlertTimes(fire_after=60, resolve_after=120, repeat_every=600)


def condition(severity: Severity = "warning", **labels: str) -> Condition:
    return Condition(
        labels={"alertname": "SlowAnswers", **labels},
        severity=severity,
        annotations={"summary": "p95 is 9 s"},
    )


class Watch:
    """Looks at given seconds; unix time is 1,000 ahead of the monotonic clock."""

    def __init__(self, times: AlertTimes = TIMES) -> None:
        self.alerts: dict[str, Alert] = {}
        self.times = times

    def at(self, second: float, *conditions: Condition) -> list[Notification]:
        now = Now(monotonic=second, unix=1000 + second)
        self.alerts, told = advance(self.alerts, conditions, now=now, times=self.times)
        return told


def told(news: list[Notification]) -> list[tuple[str, str]]:
    return [(one.status, one.labels["severity"]) for one in news]


def test_a_condition_fires_once_it_has_lasted_long_enough():
    watch = Watch()
    assert watch.at(0, condition()) == []
    assert watch.at(59, condition()) == []
    (news,) = watch.at(60, condition())
    assert news == Notification(
        status="firing",
        labels={"alertname": "SlowAnswers", "severity": "warning"},
        annotations={"summary": "p95 is 9 s"},
        starts_at=1000,
        ends_at=None,
        valid_until=1060 + 3 * 600,
    )


def test_a_condition_that_goes_before_its_time_is_never_told():
    watch = Watch()
    watch.at(0, condition())
    assert watch.at(30) == []
    assert watch.at(59, condition()) == []
    # It began anew at 59, so it has not lasted 60 seconds at 60.
    assert watch.at(60, condition()) == []
    assert told(watch.at(119, condition())) == [("firing", "warning")]


def test_an_alert_that_lasts_is_told_again_only_after_the_repeat_interval():
    watch = Watch()
    seconds = [0, 60, 120, 659, 660, 661, 1259, 1260]
    news = [len(watch.at(second, condition())) for second in seconds]
    # Told at 60, and 600 seconds after each time it was told.
    assert news == [0, 1, 0, 0, 1, 0, 0, 1]


def test_an_alert_is_over_once_its_condition_was_gone_long_enough():
    watch = Watch()
    watch.at(0, condition())
    watch.at(60, condition())
    assert watch.at(179) == []
    (news,) = watch.at(180)
    assert (news.status, news.starts_at, news.ends_at) == ("resolved", 1000, 1180)
    assert watch.alerts == {}
    assert watch.at(181) == []


def test_a_signal_that_swings_about_its_threshold_does_not_flap():
    watch = Watch()
    watch.at(0, condition())
    assert len(watch.at(60, condition())) == 1
    for second in range(70, 600, 10):
        assert watch.at(second, *([condition()] if second % 50 == 0 else [])) == []


def test_a_change_of_severity_is_told_at_once_as_an_end_and_a_begin():
    watch = Watch()
    watch.at(0, condition())
    watch.at(60, condition())
    assert told(watch.at(61, condition("critical"))) == [
        ("resolved", "warning"),
        ("firing", "critical"),
    ]
    assert told(watch.at(62, condition("warning"))) == [
        ("resolved", "critical"),
        ("firing", "warning"),
    ]
    assert len(watch.alerts) == 1


def test_a_pending_condition_that_grows_worse_fires_with_the_newest_severity():
    watch = Watch()
    watch.at(0, condition())
    watch.at(30, condition("critical"))
    assert told(watch.at(60, condition("critical"))) == [("firing", "critical")]


def test_troubles_with_different_labels_are_different_alerts():
    watch = Watch(AlertTimes(fire_after=0, resolve_after=0, repeat_every=600))
    news = watch.at(0, condition(variant="a"), condition(variant="b"))
    assert [one.labels["variant"] for one in news] == ["a", "b"]
    (gone,) = watch.at(1, condition(variant="b"))
    assert (gone.status, gone.labels["variant"]) == ("resolved", "a")


@pytest.mark.parametrize("order", [("warning", "critical"), ("critical", "warning")])
def test_of_two_conditions_with_the_same_labels_the_worse_counts(order: tuple[Severity, Severity]):
    watch = Watch(AlertTimes(fire_after=0))
    assert told(watch.at(0, *map(condition, order))) == [("firing", "critical")]


@given(
    gaps=st.lists(st.tuples(st.integers(1, 90), st.booleans()), min_size=1, max_size=60),
)
def test_ends_follow_begins_and_never_sooner_than_asked(gaps: list[tuple[int, bool]]):
    watch = Watch()
    second, is_firing, absent_since, present_since = 0, False, None, None
    for gap, present in gaps:
        second += gap
        if present:
            absent_since = None
            present_since = second if present_since is None else present_since
        elif absent_since is None:
            absent_since = second
        for one in watch.at(second, *([condition()] if present else [])):
            if one.status == "firing":
                assert present and second - present_since >= 60
                is_firing = True
            else:
                assert is_firing and not present
                is_firing, present_since = False, None
        if not present and not is_firing:
            present_since = None


def test_a_fingerprint_is_fnv_of_names_and_values_in_order():
    # FNV-1a's published offset basis is what no bytes give.
    assert fingerprint({}) == "cbf29ce484222325"
    assert fingerprint({"a": "1", "b": "2"}) == fingerprint({"b": "2", "a": "1"})
    # Without a byte between name and value these two would be the same text.
    assert fingerprint({"ab": "c"}) != fingerprint({"a": "bc"})


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"severity": "x", "alertname": "A"}, "severity"),
        ({"alertname": "A", "a-b": "1"}, "'a-b' = '1'"),
        ({"alertname": ""}, "'alertname' = ''"),
        ({"variant": "a"}, "give an `alertname`"),
    ],
)
def test_labels_that_no_receiver_takes_are_refused(labels: dict[str, str], said: str):
    with pytest.raises(ConfigError, match=said):
        Condition(labels=labels, severity="warning", annotations={})


@pytest.mark.parametrize(
    "wrong", [{"fire_after": -1}, {"repeat_every": 0}, {"resolve_after": 1e999}]
)
def test_times_that_make_no_sense_are_refused(wrong: dict[str, float]):
    with pytest.raises(ConfigError, match="must be finite"):
        AlertTimes(**wrong)
