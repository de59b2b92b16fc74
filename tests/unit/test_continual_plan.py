"""What a cycle is to do: rows mixed, recipes derived, plans refused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmpo.continual.plan import (
    LearnPlan,
    batch_digest,
    feedback_file,
    mixed_rows,
    plan_of,
    read_batch,
    require_traffic,
    small_recipe,
    suite_prompts,
    update_recipe,
    write_rows,
)
from gmpo.errors import ConfigError, DataError
from gmpo.gate import GatePolicy
from gmpo.recipe import load_recipe, recipe_of_table
from gmpo.safety import SAFETY_SET_SIZE, SAFETY_SETS, safety_prompts
from gmpo.store import Event, open_store


def rows(count: int, answer: str = "1") -> list[dict]:
    return [
        {"id": f"{answer}-{n}", "prompt": f"{answer}: {n}?", "answer": answer} for n in range(count)
    ]


def plan(**changes) -> LearnPlan:
    return LearnPlan(recipe=load_recipe("quickstart"), suites={"old": "old.jsonl"}, **changes)


@pytest.mark.parametrize("anchor", ["best", "none", "0a3f"])
def test_an_anchor_is_found_left_out_or_pinned(anchor: str):
    assert plan(anchor=anchor).anchor == anchor


@pytest.mark.parametrize("anchor", ["", "first", "v0"])
def test_an_anchor_that_is_no_version_is_refused(anchor: str):
    kept = plan().model_dump(mode="json")
    with pytest.raises(ConfigError, match="write best, none, or the first digits"):
        plan_of({**kept, "anchor": anchor})


def test_checks_that_say_nothing_of_rejected_rows_keep_a_cycles_limit():
    assert plan().checks.most_rejected == 0.5
    kept = plan().model_dump(mode="json")
    for checks, most in (({}, 0.5), ({"near_overlap": 0.7}, 0.5), ({"most_rejected": 0.9}, 0.9)):
        assert plan_of({**kept, "checks": checks}).checks.most_rejected == most


def test_half_of_the_rows_are_earlier_ones():
    mixed = mixed_rows(rows(6), rows(20, "2"), replay_share=0.5, seed=1)
    assert [row["answer"] for row in mixed] == ["1"] * 6 + ["2"] * 6
    assert len({row["id"] for row in mixed}) == 12
    assert mixed == mixed_rows(rows(6), rows(20, "2"), replay_share=0.5, seed=1)
    assert mixed != mixed_rows(rows(6), rows(20, "2"), replay_share=0.5, seed=2)


@given(
    new=st.integers(0, 30),
    earlier=st.integers(0, 30),
    share=st.floats(0, 0.9),
)
def test_new_rows_are_all_there_and_earlier_ones_at_most_their_share(new, earlier, share):
    mixed = mixed_rows(rows(new), rows(earlier, "2"), replay_share=share, seed=0)
    replayed = [row["prompt"] for row in mixed if row["answer"] == "2"]
    assert len(mixed) - len(replayed) == new
    assert len(set(replayed)) == len(replayed)
    assert len(replayed) == min(earlier, round(new * share / (1 - share)))


def test_rows_come_back_and_have_a_digest(tmp_path: Path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_rows(first, rows(3))
    write_rows(second, rows(3))
    assert read_batch([str(first)]) == rows(3)
    assert len(read_batch([str(first), str(second)])) == 6
    assert batch_digest([str(first)]) == batch_digest([str(second)])
    write_rows(second, rows(4))
    assert batch_digest([str(first)]) != batch_digest([str(second)])
    (prompt, *_) = suite_prompts(str(first))
    assert (prompt.id, prompt.columns["answer"]) == ("1-0", "1")
    with pytest.raises(DataError, match="does not exist"):
        read_batch([str(tmp_path / "none.jsonl")])


def test_an_update_that_mends_is_a_recipe_that_a_run_takes():
    changes = ["guard.mode=mend", "evaluation.skip_items=2", "checkpoint.keep=2"]
    recipe = load_recipe("quickstart", changes)
    found = update_recipe(
        LearnPlan(recipe=recipe, suites={"old": "old.jsonl"}),
        model="/models/a",
        rows=Path("/rows.jsonl"),
        number=1,
    )
    assert (found.checkpoint.keep, found.evaluation.skip_items) == (2, 0)
    # As the run's own process reads it.
    table = found.model_dump(mode="json", exclude_none=True)
    assert recipe_of_table(table, source="x") == found


def test_the_update_is_the_recipe_on_the_champion_and_the_rows():
    update = update_recipe(plan(), model="/models/a", rows=Path("/rows.jsonl"), number=3)
    own = load_recipe("quickstart")
    assert update.model.name == "/models/a"
    assert update.task.kind == "jsonl"
    assert update.task.path == "/rows.jsonl"
    assert update.training.seed == own.training.seed + 3
    assert update.training.learning_rate == own.training.learning_rate
    assert update.training.rounds == own.training.rounds
    assert update.evaluation.items == 1
    small = small_recipe(plan(), model="/models/a", rows=Path("/rows.jsonl"), number=3)
    assert (small.training.rounds, small.training.warmup_steps) == (2, 0)
    assert small.training.schedule == "constant"
    assert small.training.learning_rate == own.training.learning_rate


def test_a_plan_survives_being_kept_and_a_wrong_one_is_named():
    kept = json.loads(plan().model_dump_json())
    assert plan_of(kept) == plan()
    with pytest.raises(ConfigError, match="degradation_limit"):
        plan_of({**kept, "degradation_limit": 2.0})
    with pytest.raises(ConfigError, match="none is named; set gateway"):
        plan_of({**kept, "traffic": "requests.jsonl"})
    with pytest.raises(ConfigError, match="suites"):
        plan_of({**kept, "suites": {}})


@pytest.mark.parametrize("name", ["live_items", "safety_items"])
def test_a_plan_that_asks_one_item_is_refused_which_would_say_nothing(name: str):
    kept = plan().model_dump(mode="json")
    with pytest.raises(ConfigError, match=f"{name} = 1: .* greater than or equal to 2"):
        plan_of({**kept, name: 1})
    assert plan_of({**kept, name: 2}).model_dump()[name] == 2


@pytest.mark.parametrize("count", [1, 2])
def test_a_file_of_requests_has_at_least_two(tmp_path: Path, count: int):
    path = tmp_path / "requests.jsonl"
    write_rows(path, rows(count))
    asked = plan(traffic=str(path), gateway="http://127.0.0.1:8000/v1")
    if count == 1:
        with pytest.raises(DataError, match=r"requests\.jsonl has 1 request, .* at least 2"):
            require_traffic(asked)
    else:
        require_traffic(asked)
    require_traffic(plan())


def test_a_plan_has_no_number_of_safety_prompts_since_only_whole_sets_can_pass():
    with pytest.raises(ConfigError, match="safety_prompts"):
        plan_of({**plan().model_dump(mode="json"), "safety_prompts": 300})
    needed = GatePolicy(safety_limits={"canaries": 0.1}).min_safety_prompts
    assert {len(safety_prompts(name)) for name in SAFETY_SETS} == {SAFETY_SET_SIZE} == {needed}


def served(*numbers: int) -> list[Event]:
    """Answers that the gateway recorded, with consent."""
    return [
        Event(
            kind="text",
            time=time.time(),
            payload={
                "messages": [{"role": "user", "content": f"What is {n} times 7?"}],
                "prompt": None,
                "completions": [str(7 * n)],
                "finish_reason": "stop",
                "consent": True,
            },
            request_id=f"r{n}",
        )
        for n in numbers
    ]


def liked(*numbers: int) -> list[Event]:
    vote = {"score": 1.0, "comment_length": 0}
    return [
        Event(kind="feedback", time=time.time(), payload=vote, request_id=f"r{n}") for n in numbers
    ]


def test_what_users_wrote_is_readable_by_its_owner_only(tmp_path: Path):
    path = tmp_path / "learn" / "feedback-000001.jsonl"
    path.parent.mkdir()
    path.touch(mode=0o644)  # of an earlier version, e.g. of a batch that was too small
    with open_store(str(tmp_path / "store.db")) as store:
        store.add_events([*served(1), *liked(1)])
        assert feedback_file(store, "bot", path.parent)[0] == path
    assert path.stat().st_mode & 0o777 == 0o600
    for name in ("accepted.jsonl", "train.jsonl"):
        write_rows(tmp_path / name, rows(2))
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    write_rows(tmp_path / "drawn.jsonl", rows(2), is_private=False)
    assert (tmp_path / "drawn.jsonl").stat().st_mode & 0o777 != 0o600


def test_confirmed_answers_come_until_a_cycle_had_them(tmp_path: Path):
    def had(path: Path, **result: str) -> None:
        payload = {"request": {"data": [str(path)]}}
        cycle = store.begin_cycle("bot", state="validate", payload=payload)
        store.move_cycle(cycle, state="over", payload={**payload, "result": result}, ends=True)

    with open_store(str(tmp_path / "store.db")) as store:
        store.add_events([*served(1, 2, 3), *liked(1, 2)])
        path, told = feedback_file(store, "bot", tmp_path)
        assert (told["rows"], told["left_out"]["no confirmed answer"]) == (2, 1)
        # A batch that was too small waits for more; so does what was abandoned.
        had(path, outcome="refused", reason="Data validation failed: too_few_rows")
        had(path, outcome="abandoned", reason="Abandoned")
        # The third was answered before these cycles, and is confirmed only now.
        store.add_events(liked(3))
        path, told = feedback_file(store, "bot", tmp_path)
        assert (path.name, told["rows"]) == ("feedback-000003.jsonl", 3)
        assert [row["answer"] for row in read_batch([str(path)])] == ["7", "14", "21"]
        had(path, outcome="refused", reason="Performance degradation detected")
        store.add_events([*served(4), *liked(4)])
        path, told = feedback_file(store, "bot", tmp_path)
        assert (told["rows"], told["left_out"]["in an earlier cycle"]) == (1, 3)
        assert [row["answer"] for row in read_batch([str(path)])] == ["28"]
