"""Five cycles of a small model in front of traffic: two are poisoned, and must not reach it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gmpo.config import RunConfig
from gmpo.continual.cycle import ControllerSettings, Moment, run_cycle
from gmpo.continual.plan import LearnPlan, suite_prompts, write_rows
from gmpo.continual.records import CycleResult, StepReport
from gmpo.continual.serving import served_process
from gmpo.continual.traffic import ServerClient, open_client
from gmpo.continual.work import RealWork, cycle_request
from gmpo.errors import ConfigError
from gmpo.own_servers import require_serving
from gmpo.recipe import load_recipe
from gmpo.records import Prompt
from gmpo.registry import Registry
from gmpo.statistics import wilson_interval
from gmpo.store import Store, open_store

__all__ = ["DemoRows", "DemoSettings", "default_settings", "larger_of_two_and_three", "run_demo"]

_NAME = "demo"
_POISONED, _COLLAPSING, _NEW_TASK = 3, 4, 5
_STEP_SIZE_FACTOR = 30.0
_TRAFFIC_SECONDS = 4.0
"""Between two requests of the client: training has the same two cores."""

_Row = Mapping[str, Any]
_Tell = Callable[[str, Moment, StepReport | None], None]


@dataclass(frozen=True, kw_only=True)
class DemoRows:
    """What the demonstration learns and asks.

    Attributes:
        old: rows to learn of the old task.
        old_held_out: items of it that are never learned: those that users ask.
        new: rows to learn of the new task.
        new_held_out: items of it.
    """

    old: tuple[_Row, ...]
    old_held_out: tuple[_Row, ...]
    new: tuple[_Row, ...]
    new_held_out: tuple[_Row, ...]


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """A demonstration's model, data and recipe.

    Attributes:
        model: that serves at the start.
        rows: what there is to learn.
        recipe: of each update.
        batch_rows: rows of each batch.
        new_task_rounds: rounds of the update that learns the new task.
        gate_items: held-out items of each task that the gate asks, the first ones.
        plan: further settings of the cycles.
        serve: further options of `gmpo serve`.
        max_tokens: longest answer.
    """

    model: Path
    rows: DemoRows
    recipe: RunConfig
    batch_rows: int = 64
    new_task_rounds: int = 8
    gate_items: int = 400
    plan: Mapping[str, Any] = field(default_factory=dict)
    serve: tuple[str, ...] = ()
    max_tokens: int = 8


def larger_of_two_and_three(*, held_out: int = 1000, new_held_out: int = 300) -> DemoRows:
    """The larger of two numbers below 1,000; the largest of three is the new task.

    Args:
        held_out: items of the old task that are never learned.
        new_held_out: items of the new task that are never learned.
    """
    draw = random.Random("demo")
    pairs = dict.fromkeys(tuple(draw.sample(range(1000), 2)) for _ in range(3 * held_out))
    larger = [_row("larger", f"Which number is larger, {a} or {b}?", max(a, b)) for a, b in pairs]
    triples = dict.fromkeys(tuple(draw.sample(range(1000), 3)) for _ in range(2 * new_held_out))
    largest = [
        _row("largest", f"Which number is the largest, {a}, {b} or {c}?", max(a, b, c))
        for a, b, c in triples
    ]
    return DemoRows(
        old=tuple(larger[held_out:]),
        old_held_out=tuple(larger[:held_out]),
        new=tuple(largest[new_held_out:]),
        new_held_out=tuple(largest[:new_held_out]),
    )


def _row(category: str, question: str, answer: int) -> _Row:
    return {
        # Not the instruction first: prompts that begin with eight equal words or more count as
        # contaminated by each other.
        "prompt": f"{question} Answer with just the number.",
        "answer": str(answer),
        "category": category,
    }


def default_settings() -> DemoSettings:
    """SmolLM2-135M as it comes; adapters are trained, and merged into each version."""
    from gmpo.policy.load import model_folder

    recipe = load_recipe(
        "quickstart",
        [
            "lora.rank=16",
            "training.rounds=4",
            "training.learning_rate=1.5e-4",
            "training.schedule=constant",
            "training.warmup_steps=2",
            "training.max_tokens_per_micro_batch=512",
            "training.gradient_cosine_every=0",
            "sampling.max_new_tokens=8",
            "evaluation.every_rounds=0",
            "guard.mode=stop",
        ],
    )
    return DemoSettings(
        model=Path(model_folder("smollm2-135m")),
        rows=larger_of_two_and_three(),
        recipe=recipe,
        plan={
            "check_samples": 6,
            "check_earlier_rows": 48,
            "small_rounds": 1,
            "safety_items": 100,
            "live_items": 100,
            # The client asks once in a few seconds, and its requests are what the candidate answers
            # unseen.
            "live_users": 2,
            "live_seconds": 20.0,
            "live_least": 2,
            "checks": {"reject_always_solved": False, "most_rejected": 1.0},
        },
        serve=("--max-rows", "64", "--max-queued", "512"),
    )


def run_demo(
    folder: Path,
    settings: DemoSettings | None = None,
    *,
    threads: int,
    tell: _Tell,
    warn: Callable[[str], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[dict[str, Any]]:
    """Serve a model, send it traffic, and run five cycles beside it; an object a cycle.

    Each object holds the cycle's result, and how many held-out items the server then answered
    rightly through its HTTP interface.

    Args:
        folder: new; of the store, the versions and the cycles.
        settings: None is SmolLM2-135M on numbers.
        threads: CPU threads of training and serving.
        tell: told the steps.
        warn: told in one sentence what is not as expected.
        should_stop: asked between steps and while a run trains.

    Raises:
        ConfigError: the folder holds a demonstration already.
        DependencyError: the extra `serve` is not installed.
        gmpo.errors.RunStopped: `should_stop` said so.
        gmpo.errors.GmpoError: the model cannot be had, or a step cannot be done.
    """
    require_serving("the demonstration")
    if (folder / "store.db").exists():
        raise ConfigError(f"{folder} holds a demonstration already; choose another --folder")
    settings = settings or default_settings()
    files = _write_files(folder, settings)
    with open_store(str(folder / "store.db")) as store:
        registry = Registry(store, folder / "models")
        first = registry.add(
            settings.model, name=_NAME, parent=None, lineage={"why": "demo"}, metrics={}
        )
        registry.adopt(_NAME, first.version, reason="where the demonstration starts")
        arguments = ("--store", store.where, "--follow", _NAME, "--name", _NAME, *settings.serve)
        with (
            served_process(first.path, arguments=arguments, threads=threads, seconds=120) as url,
            open_client(url) as client,
        ):
            demo = _Demo(
                folder=folder,
                settings=settings,
                files=files,
                store=store,
                work=RealWork(
                    store=store,
                    registry=registry,
                    threads=threads,
                    warn=warn,
                    should_stop=should_stop,
                ),
                client=client,
                tell=tell,
            )
            yield from demo.cycles()


@dataclass
class _StepTimes:
    """Seconds of a cycle's steps, by what the controller tells of them and is passed on."""

    tell: _Tell
    seconds: dict[str, float] = field(default_factory=dict)
    _began: float = 0.0

    def __call__(self, step: str, moment: Moment, report: StepReport | None) -> None:
        now = time.monotonic()
        if moment == "begins":
            self._began = now
        else:
            self.seconds[step] = round(now - self._began, 1)
        self.tell(step, moment, report)


@dataclass(frozen=True, kw_only=True)
class _Demo:
    """A demonstration under way."""

    folder: Path
    settings: DemoSettings
    files: Mapping[str, Path]
    store: Store
    work: RealWork
    client: ServerClient
    tell: _Tell

    def cycles(self) -> Iterator[dict[str, Any]]:
        """The start, then each cycle as it ends."""
        began = time.monotonic()
        start = self._served("old", "new")
        yield {"cycle": 0, "served": start, "seconds": round(time.monotonic() - began, 1)}
        for number in range(1, 6):
            steps = _StepTimes(self.tell)
            with self._traffic() as requests:
                result = self._cycle(number, steps)
            # The new task is asked before and after it is learned.
            is_near_new = number >= _NEW_TASK - 1
            asked = time.monotonic()
            served = self._served(*(("old", "new") if is_near_new else ("old",)))
            steps.seconds["served"] = round(time.monotonic() - asked, 1)
            yield {
                "cycle": number,
                "data": _told(number),
                **result.as_dict(),
                "served": served,
                "served_change": round(served["old"]["accuracy"] - start["old"]["accuracy"], 4),
                "traffic": dict(requests),
                "step_seconds": steps.seconds,
                "seconds": round(time.monotonic() - began, 1),
            }

    def _cycle(self, number: int, tell: _Tell) -> CycleResult:
        request = cycle_request(
            self._plan(number), [str(self.files[f"batch-{number}"])], trigger=_told(number)
        )
        return run_cycle(
            self.store,
            _NAME,
            self.work,
            folder=self.folder / "learn" / _NAME,
            request=lambda: request,
            settings=ControllerSettings(
                tell=tell, should_stop=self.work.should_stop, warn=self.work.warn
            ),
        )

    def _plan(self, number: int) -> LearnPlan:
        training = self.settings.recipe.training
        changes: dict[str, Any] = {}
        if number == _COLLAPSING:
            changes["learning_rate"] = training.learning_rate * _STEP_SIZE_FACTOR
        elif number == _NEW_TASK:
            changes["rounds"] = self.settings.new_task_rounds
        recipe = self.settings.recipe.model_copy(
            update={"training": training.model_copy(update=changes)}
        )
        # What the new task asks is held against its own champion, once there is something to learn.
        names = ("old", "new") if number == _NEW_TASK else ("old",)
        return LearnPlan(
            recipe=recipe,
            suites={name: str(self.files[f"{name}-gate"]) for name in names},
            replay=(str(self.files["replay"]),),
            approval="auto",
            gateway=self.client.url,
            **self.settings.plan,
        )

    def _served(self, *suites: str) -> dict[str, Any]:
        """Accuracy of what serves, through its HTTP interface."""
        told: dict[str, Any] = {"version": self.client.served()[1]}
        for name in suites:
            prompts = suite_prompts(str(self.files[name]))
            answers = self.client.ask(prompts, max_tokens=self.settings.max_tokens, at_once=64)
            right = sum(answer.is_correct for answer in answers)
            told[name] = {
                "accuracy": round(right / len(answers), 4),
                "interval_95": [round(end, 4) for end in wilson_interval(right, len(answers))],
                "items": len(answers),
                "failed": sum(answer.error is not None for answer in answers),
            }
        return told

    @contextmanager
    def _traffic(self) -> Iterator[dict[str, int]]:
        """A client that asks on and on while the block runs."""
        prompts = suite_prompts(str(self.files["old"]))
        counts = {"requests": 0, "failed": 0}
        over = threading.Event()

        def ask_on() -> None:
            draw = random.Random("traffic")
            while not over.wait(_TRAFFIC_SECONDS):
                prompt: Prompt = draw.choice(prompts)
                (answer,) = self.client.ask([prompt], max_tokens=self.settings.max_tokens)
                counts["requests"] += 1
                counts["failed"] += answer.error is not None

        thread = threading.Thread(target=ask_on, name="gmpo-demo-client")
        thread.start()
        try:
            yield counts
        finally:
            over.set()
            thread.join()


def _told(number: int) -> str:
    """What the cycle gets, in words."""
    return {
        _POISONED: "rows of the old task with wrong answers",
        _COLLAPSING: f"rows of the old task, and a step size {_STEP_SIZE_FACTOR:g} times too large",
        _NEW_TASK: "rows of a new task",
    }.get(number, "rows of the old task")


def _write_files(folder: Path, settings: DemoSettings) -> dict[str, Path]:
    """Suites, replay and the five batches."""
    rows, size = settings.rows, settings.batch_rows
    batches = [rows.old[number * size : (number + 1) * size] for number in range(4)]
    replay = rows.old[4 * size : 5 * size]
    if len(replay) < size // 4 or len(rows.new) < size:
        raise ConfigError(
            f"batches of {size} rows need {4 * size + size // 4} rows of the old task and {size} "
            f"of the new one; there are {len(rows.old)} and {len(rows.new)}"
        )
    batches[_POISONED - 1] = _poisoned(batches[_POISONED - 1])
    written: dict[str, Sequence[_Row]] = {
        "old": rows.old_held_out,
        "new": rows.new_held_out,
        "old-gate": rows.old_held_out[: settings.gate_items],
        "new-gate": rows.new_held_out[: settings.gate_items],
        "replay": replay,
        **{f"batch-{number}": batch for number, batch in enumerate(batches, start=1)},
        f"batch-{_NEW_TASK}": rows.new[:size],
    }
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    files = {name: data / f"{name}.jsonl" for name in written}
    for name, listed in written.items():
        numbered = [{**row, "id": f"{name}-{n}"} for n, row in enumerate(listed)]
        write_rows(files[name], numbered, is_private=False)
    return files


def _poisoned(rows: Sequence[_Row]) -> tuple[_Row, ...]:
    """The rows with each other's answers, so that nothing but the model can tell."""
    answers = [row["answer"] for row in rows]
    moved = answers[1:] + answers[:1]
    return tuple({**row, "answer": answer} for row, answer in zip(rows, moved, strict=True))
