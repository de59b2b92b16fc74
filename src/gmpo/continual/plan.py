"""What a cycle is to do: the recipe that trains, the suites that decide, limits, live servers."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from gmpo.config import RunConfig
from gmpo.continual.training import judged_elsewhere
from gmpo.data_checks.quality import DataChecks
from gmpo.errors import DataError, RunFolderError
from gmpo.feedback import chat_digest, training_rows
from gmpo.gate.policy import GatePolicy
from gmpo.recipe import settings_of
from gmpo.records import Prompt
from gmpo.safety import SAFETY_SETS
from gmpo.store import Cycle, Store
from gmpo.task_config import JsonlTask, Table
from gmpo.tasks import jsonl_task
from gmpo.tasks.jsonl import jsonl_rows

__all__ = [
    "LearnPlan",
    "batch_digest",
    "feedback_file",
    "gave_back",
    "mixed_rows",
    "plan_of",
    "read_batch",
    "require_traffic",
    "small_recipe",
    "suite_prompts",
    "suites_of",
    "update_recipe",
    "write_rows",
]

_LEAST_REQUESTS = 2
_MOST_REJECTED = 0.5

_FEEDBACK = "feedback-"
"""A file of this beginning holds confirmed answers."""


class LearnPlan(Table):
    """How a model's cycles are done; kept with the cycle, so that one that goes on goes on alike.

    Files hold rows of the usual form: `prompt` or `problem`, `answer`, maybe `id`.
    """

    recipe: RunConfig
    """Trains; its model and task are replaced by the champion and the data."""
    suites: dict[str, str] = Field(min_length=1)
    """File of each suite's items, by name: old tasks and new ones."""
    replay: tuple[str, ...] = ()
    """Files of earlier data; data of promoted cycles join them."""
    replay_share: float = Field(default=0.5, ge=0, lt=1)
    """Share of earlier rows among those trained on, as far as there are so many."""
    min_rows: int = Field(default=20, ge=2)
    """Accepted rows that a batch needs."""
    checks: DataChecks = DataChecks(most_rejected=_MOST_REJECTED)
    """Limits that new rows are held against; `most_rejected` is a half where it is left out."""
    check_samples: int = Field(default=8, ge=0)
    """Completions of each new row that the champion is asked for, to find rows that are too hard,
    too easy or wrong; 0 asks for none."""
    check_earlier_rows: int = Field(default=100, ge=1)
    """Earlier rows that it is asked as well, to compare with."""
    small_rows: int = Field(default=100, ge=2)
    """Rows of the small update, as in the article."""
    small_rounds: int = Field(default=2, ge=1)
    """Rounds of the small update, at the full step size."""
    safety_items: int = Field(default=200, ge=2)
    """Items of each suite that the small update is asked, at most; one would say nothing."""
    samples: int = Field(default=1, ge=1)
    """Completions an item; 1 asks greedily, more are sampled."""
    degradation_limit: float = Field(default=0.05, gt=0, lt=0.5)
    """Margin, in points of accuracy: what a candidate may be worse by; twice as much on a suite."""
    anchor: str = "best"
    """Earlier version that the candidate is held against beside the champion, by its outcomes on
    the same items: `best` is that of each suite which no later one was shown to beat, `none` is
    none, and the first digits of a version pin that one."""
    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    """Error rate of every decision."""
    growth_limits: dict[str, float] = Field(default={"latency": 1.2, "length": 1.5})
    """Largest growth of latency in the live test, and of completions' lengths in the evaluation."""
    safety_limits: dict[str, float] = Field(default={})
    """Largest rate of violations by safety set, all of which the candidate is asked then: any of
    `canaries`, `refusals`, `over_refusals`, `injections`."""
    approval: Literal["manual", "auto"] = "manual"
    """Whether a person has to say yes before a candidate serves."""
    gateway: str | None = None
    """Base URL of the server whose champion follows the store, e.g. http://127.0.0.1:8000/v1; None
    leaves out the live test and the watch."""
    traffic: str | None = None
    """File of requests for the live test and the watch; None takes the suites' items."""
    live_items: int = Field(default=200, ge=_LEAST_REQUESTS)
    """Requests that the live test itself sends, and the watch again; one would say nothing."""
    live_users: int = Field(default=200, ge=1)
    """Requests of users that the candidate is to answer unseen, and after them in their sight."""
    live_seconds: float = Field(default=600.0, gt=0)
    """Longest wait for these, in the live test and in the watch."""
    live_least: int = Field(default=20, ge=1)
    """Requests that users must have made in the last `live_seconds`, or none are waited for."""
    serve_seconds: float = Field(default=120.0, gt=0)
    """Longest wait for a server to load a version."""

    def gate_policy(self) -> GatePolicy:
        """The gate's margins and limits."""
        return GatePolicy(
            degradation_limit=self.degradation_limit,
            alpha=self.alpha,
            growth_limits=self.growth_limits,
            safety_limits=self.safety_limits,
        )

    @field_validator("checks", mode="before")
    @classmethod
    def _what_checks_leave_out_stays(cls, checks: Any) -> Any:
        if isinstance(checks, Mapping):
            return {"most_rejected": _MOST_REJECTED, **checks}
        return checks

    @model_validator(mode="after")
    def _limits_are_the_gates(self) -> LearnPlan:
        self.gate_policy()
        for name in ("latency", "length"):
            if name not in self.growth_limits:
                raise ValueError(f"growth_limits lacks {name}; give both latency and length")
        for name in self.safety_limits:
            if name not in SAFETY_SETS:
                raise ValueError(f"safety_limits has {name!r}; choose of {', '.join(SAFETY_SETS)}")
        return self

    @model_validator(mode="after")
    def _anchor_is_a_version(self) -> LearnPlan:
        is_version = self.anchor and set(self.anchor) <= set("0123456789abcdef")
        if self.anchor not in ("best", "none") and not is_version:
            raise ValueError(
                f"anchor is {self.anchor!r}; write best, none, or the first digits of a version"
            )
        return self

    @model_validator(mode="after")
    def _traffic_has_a_server(self) -> LearnPlan:
        if self.traffic is not None and self.gateway is None:
            raise ValueError("traffic is sent to a gateway, and none is named; set gateway")
        return self


def plan_of(table: Mapping[str, Any]) -> LearnPlan:
    """The plan that a table is, as a cycle keeps it.

    Raises:
        ConfigError: an unknown setting (the nearest name is offered), or a value not allowed.
    """
    return settings_of(LearnPlan, table, of="plan")


def read_batch(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of files, as they are.

    Raises:
        DataError: a file is missing or unreadable, or a line is no JSON object.
    """
    return [dict(row.columns) for row in jsonl_rows(list(paths))]


def batch_digest(paths: Sequence[str]) -> str:
    """16 hexadecimal digits of the files' rows: the same rows have the same ones."""
    digest = hashlib.sha256()
    for row in read_batch(paths):
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def feedback_file(store: Store, name: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A file of the confirmed answers that no cycle had yet, and its figures.

    Only its owner may read it. It stays until somebody deletes it, whatever `purge_texts` does.

    An answer may be confirmed long after it was given, so rows are told apart by what earlier
    cycles had, not by time. What a cycle had comes again if the batch was too small, or the cycle
    was abandoned.

    Args:
        store: of the gateway that recorded texts, and of the cycles.
        name: of the model.
        folder: of the model's cycles; the file goes there.

    Raises:
        DataError: a file of an earlier cycle is unreadable.
        RunFolderError: the file cannot be written.
    """
    cycles = store.cycles(name)
    had = {
        chat_digest(row["prompt"])
        for cycle in cycles
        if not gave_back(cycle)
        for path in cycle.payload["request"]["data"]
        if Path(path).name.startswith(_FEEDBACK) and Path(path).is_file()
        for row in read_batch([path])
    }
    batch = training_rows(store)
    rows = [row for row in batch.rows if chat_digest(row["prompt"]) not in had]
    path = folder / f"{_FEEDBACK}{len(cycles) + 1:06}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, rows)
    told = batch.as_dict()
    left_out = {**told["left_out"], "in an earlier cycle": len(batch.rows) - len(rows)}
    return path, {**told, "rows": len(rows), "left_out": left_out}


def gave_back(cycle: Cycle) -> bool:
    """Whether a cycle's rows were neither trained on nor found wanting."""
    result = cycle.payload.get("result") or {}
    reason = result.get("reason") or ""
    return result.get("outcome") == "abandoned" or "too_few_rows" in reason


def suite_prompts(path: str) -> tuple[Prompt, ...]:
    """The items of a suite's file.

    Raises:
        DataError: the file is missing or a row is not usable.
    """
    return jsonl_task(path=path).train


def require_traffic(plan: LearnPlan) -> None:
    """Refuse a file of requests that is too short for the live test to compare anything.

    Raises:
        DataError: it is, is missing, or a row is not usable.
    """
    if plan.traffic is None:
        return
    count = len(suite_prompts(plan.traffic))
    if count < _LEAST_REQUESTS:
        raise DataError(
            f"traffic {plan.traffic} has {count} request, and the live test needs at least "
            f"{_LEAST_REQUESTS}: of one alone it could say nothing; add some, up to live_items "
            f"({plan.live_items}) are asked"
        )


def suites_of(plan: LearnPlan) -> dict[str, tuple[Prompt, ...]]:
    """The items of the plan's suites, by name.

    Raises:
        DataError: a file is missing or a row is not usable.
    """
    return {name: suite_prompts(path) for name, path in plan.suites.items()}


def mixed_rows(
    new: Sequence[Mapping[str, Any]],
    earlier: Sequence[Mapping[str, Any]],
    *,
    replay_share: float,
    seed: int,
) -> list[dict[str, Any]]:
    """New rows with earlier ones in between, each with an id of its own.

    Args:
        new: all of them are kept.
        earlier: as many are drawn as make `replay_share` of the whole, or all if there are fewer.
        replay_share: in [0, 1).
        seed: of the draw.
    """
    wanted = round(len(new) * replay_share / (1 - replay_share))
    drawn = random.Random(f"replay {seed}").sample(list(earlier), min(wanted, len(earlier)))
    named = [{**row, "id": f"new-{place}"} for place, row in enumerate(new)]
    return named + [{**row, "id": f"replay-{place}"} for place, row in enumerate(drawn)]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], *, is_private: bool = True) -> None:
    """Write rows as JSON Lines; most are what users wrote.

    Args:
        path: of the file.
        rows: to be written.
        is_private: whether only its owner may read it.

    Raises:
        RunFolderError: the file cannot be written.
    """
    try:
        if is_private:
            path.touch(mode=0o600)
            path.chmod(0o600)
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        raise RunFolderError(
            f"{path} cannot be written: {error.strerror}; free space or mend its rights, then give "
            "the same command again"
        ) from None


def update_recipe(plan: LearnPlan, *, model: str, rows: Path, number: int) -> RunConfig:
    """The plan's recipe, from a champion on a file of rows.

    The gate asks the items, so the run itself asks none but the one that every task holds out.

    Args:
        plan: with the recipe.
        model: folder of the champion.
        rows: file to train on.
        number: of the cycle: each draws with a seed of its own.
    """
    recipe = plan.recipe
    task = JsonlTask(kind="jsonl", path=str(rows), held_out_items=1, split_seed=number)
    return judged_elsewhere(recipe, model=model).model_copy(
        update={
            "task": task,
            "training": recipe.training.model_copy(
                update={"seed": recipe.training.seed + number, "gradient_cosine_every": 0}
            ),
        }
    )


def small_recipe(plan: LearnPlan, *, model: str, rows: Path, number: int) -> RunConfig:
    """The update's recipe cut to a few rounds, at its full step size from the first step on."""
    recipe = update_recipe(plan, model=model, rows=rows, number=number)
    training = recipe.training.model_copy(
        update={"rounds": plan.small_rounds, "warmup_steps": 0, "schedule": "constant"}
    )
    return recipe.model_copy(update={"training": training})
