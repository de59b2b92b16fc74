"""`gmpo learn`."""

from __future__ import annotations

import getpass
import json
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gmpo.cli.conventions import (
    JsonOption,
    SetOption,
    existing_store,
    is_given,
    refuses_clearly,
    say,
    threads_of_each,
    warn,
)
from gmpo.errors import ConfigError, GmpoError, RunStopped
from gmpo.recipe import load_recipe
from gmpo.shared_cores import share_cores

if TYPE_CHECKING:
    from gmpo.continual import ControllerSettings, Moment
    from gmpo.continual.plan import LearnPlan
    from gmpo.continual.records import CycleResult, StepReport
    from gmpo.continual.triggers import Triggers
    from gmpo.continual.work import RealWork
    from gmpo.store import Cycle, Store

__all__ = ["learn"]

_StoreUrl = Annotated[
    str | None, typer.Option(help="The store: a SQLite file or a PostgreSQL URL.")
]
_Name = Annotated[str | None, typer.Option(help="The model, as the store names it.")]
_Data = Annotated[
    list[str] | None,
    typer.Option(help="JSONL file or folder of new rows: prompt, answer; repeatable."),
]
_Feedback = Annotated[
    bool,
    typer.Option("--feedback", help="Learn from answers that the store's gateway recorded."),
]
_Recipe = Annotated[str, typer.Option(help="Recipe that trains; its task is not used.")]
_Suites = Annotated[
    list[str] | None,
    typer.Option("--suite", help="NAME=FILE of items, of old tasks and new ones; repeatable."),
]
_Replay = Annotated[
    list[str] | None, typer.Option(help="File of earlier rows to mix in; repeatable.")
]
_Plan = Annotated[Path | None, typer.Option(help="TOML file of further settings of the cycle.")]
_Gateway = Annotated[
    str | None,
    typer.Option(help="Base URL of gmpo serve --follow NAME, for live test and watch."),
]
_Approval = Annotated[
    str | None, typer.Option(help="manual (default): a person says yes; auto: nobody has to.")
]
_Folder = Annotated[
    Path | None,
    typer.Option(
        help="Holds cycles and versions; default: the SQLite store's own, and of --demo "
        "runs/learn-demo, -2, ..."
    ),
]
_WhenRows = Annotated[
    int | None, typer.Option(min=1, help="Begin only with so many rows that no cycle had.")
]
_EveryHours = Annotated[
    float | None, typer.Option(min=0.0, help="Begin only so long after the newest cycle.")
]
_OnDrift = Annotated[
    bool, typer.Option("--on-drift", help="Begin only after an anomaly of what serves.")
]
_Wait = Annotated[
    float, typer.Option(min=0.0, help="Seconds to wait for another controller's lease.")
]
_Approve = Annotated[
    bool, typer.Option("--approve", help="Say yes to the candidate that waits, and go on.")
]
_Refuse = Annotated[
    bool, typer.Option("--refuse", help="Say no to the candidate that waits, and go on.")
]
_Abandon = Annotated[str | None, typer.Option(help="End the unfinished cycle, for this reason.")]
_Demo = Annotated[
    bool, typer.Option("--demo", help="Five cycles of a small model, two of them bad ones.")
]
_DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check data and plan; train and store nothing.")
]


@refuses_clearly
def learn(
    context: typer.Context,
    store: _StoreUrl = None,
    name: _Name = None,
    data: _Data = None,
    feedback: _Feedback = False,
    recipe: _Recipe = "quickstart",
    suites: _Suites = None,
    replay: _Replay = None,
    plan: _Plan = None,
    gateway: _Gateway = None,
    approval: _Approval = None,
    overrides: SetOption = None,
    folder: _Folder = None,
    when_rows: _WhenRows = None,
    every_hours: _EveryHours = None,
    on_drift: _OnDrift = False,
    wait: _Wait = 0.0,
    approve: _Approve = False,
    refuse: _Refuse = False,
    abandon: _Abandon = None,
    dry_run: _DryRun = False,
    demo: _Demo = False,
    as_json: JsonOption = False,
) -> None:
    """Bring new data into the model that serves, if what comes out is no worse.

    An unfinished cycle goes on first, by the plan it began with. Exit code 0: a cycle is over
    (promoted, refused or rolled back: --json tells), waits for a person, or none was due; 2: an
    error, and the next call goes on; 130: stopped as asked.
    """
    share_cores()
    if demo:
        _refuse_beside_demo(context)
        _run_demo(folder, as_json=as_json)
        return
    if store is None or name is None:
        raise ConfigError("--store and --name say which model learns; or try gmpo learn --demo")
    acts = [approve, refuse, abandon is not None, dry_run]
    if sum(acts) > 1:
        raise ConfigError("give one of --approve, --refuse, --abandon and --dry-run")
    asked = _Asked(
        data=tuple(data or ()),
        feedback=feedback,
        recipe=recipe,
        suites=tuple(suites or ()),
        replay=tuple(replay or ()),
        plan=plan,
        gateway=gateway,
        approval=approval,
        overrides=tuple(overrides or ()),
    )
    with _opened(store, name, folder, wait_seconds=wait) as learner:
        if abandon is not None:
            learner.abandon(abandon, as_json=as_json)
        elif dry_run:
            learner.dry_run(asked, as_json=as_json)
        else:
            if approve or refuse:
                learner.answer(approved=approve)
            learner.cycle(asked, _triggers(when_rows, every_hours, on_drift), as_json=as_json)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """Options of a new cycle, as they were given."""

    data: tuple[str, ...]
    feedback: bool
    recipe: str
    suites: tuple[str, ...]
    replay: tuple[str, ...]
    plan: Path | None
    gateway: str | None
    approval: str | None
    overrides: tuple[str, ...]

    def learn_plan(self) -> LearnPlan:
        """The plan that options and file make."""
        from gmpo.continual.plan import plan_of

        table = {} if self.plan is None else _toml(self.plan)
        for key in ("recipe", "suites", "replay", "gateway", "approval"):
            if key in table:
                raise ConfigError(f"{self.plan} sets {key}; give it as an option")
        chosen: dict[str, Any] = {
            "recipe": load_recipe(self.recipe, self.overrides),
            "suites": dict(_suite(word) for word in self.suites),
            "replay": tuple(str(Path(path).absolute()) for path in self.replay),
        }
        if self.gateway is not None:
            chosen["gateway"] = self.gateway
        if self.approval is not None:
            chosen["approval"] = self.approval
        if not chosen["suites"]:
            raise ConfigError("no suite is named: --suite NAME=FILE says what decides")
        return plan_of({**table, **chosen})


class _NotDueError(Exception):
    """None of the triggers asks for a cycle."""


@dataclass(frozen=True, kw_only=True)
class _Learner:
    """One model's cycles, at the places where they are kept."""

    name: str
    store: Store
    folder: Path
    work: RealWork
    wait_seconds: float

    def answer(self, *, approved: bool) -> None:
        """A person's yes or no to the candidate that waits."""
        from gmpo.continual.release import answer_approval

        answer_approval(self.store, self.name, approved=approved, by=getpass.getuser())

    def abandon(self, reason: str, *, as_json: bool) -> None:
        """End the unfinished cycle where it is."""
        from gmpo.continual import abandon_cycle

        result = abandon_cycle(self.store, self.name, reason=reason, settings=self._settings())
        if result is None:
            raise ConfigError(f"no cycle of {self.name!r} goes on, so there is none to abandon")
        _print(result, as_json=as_json)

    def dry_run(self, asked: _Asked, *, as_json: bool) -> None:
        """What a cycle would check and do, without training, stored nowhere."""
        from gmpo.continual.work import dry_run

        plan = asked.learn_plan()
        _require_gateway(plan)
        # A controller may be at work, so even the file of feedback is another one than a cycle's.
        with TemporaryDirectory(prefix="gmpo-learn-") as apart:
            data = self._data(asked, Path(apart))
            told = dry_run(plan, data, self.work, name=self.name, folder=self.folder)
        if as_json:
            print(json.dumps(told))
            return
        for key, value in told.items():
            print(f"{key}: {value}")

    def cycle(self, asked: _Asked, triggers: Triggers, *, as_json: bool) -> None:
        """Run the unfinished cycle to its end, or a new one if one is due."""
        from gmpo.continual import run_cycle

        try:
            result = run_cycle(
                self.store,
                self.name,
                self.work,
                folder=self.folder,
                request=lambda: self._request(asked, triggers),
                settings=self._settings(),
            )
        except _NotDueError:
            warn("no cycle is due; nothing was done")
            return
        _print(result, as_json=as_json)

    def _request(self, asked: _Asked, triggers: Triggers) -> dict[str, Any]:
        """What a new cycle is to do; the lease is held, so no other one ends or begins meanwhile.

        Raises:
            _NotDueError: none of the triggers asks for a cycle.
        """
        from gmpo.continual import learning_champion
        from gmpo.continual.work import cycle_request

        champion, plan = learning_champion(self.store, self.name), asked.learn_plan()
        data = self._data(asked, self.folder)
        try:
            request = cycle_request(plan, data, trigger=self._why_due(data, triggers))
            again = "then give this command again; no cycle was begun"
            self.work.require_whole(self.name, champion.version, then=again)
            _require_gateway(plan)
        except (_NotDueError, GmpoError):
            if asked.feedback:  # users' texts that no cycle has
                Path(data[0]).unlink(missing_ok=True)
            raise
        return request

    def _why_due(self, data: tuple[str, ...], triggers: Triggers) -> str:
        from gmpo.continual.plan import batch_digest, read_batch
        from gmpo.continual.rows_had import num_new_rows
        from gmpo.continual.triggers import due

        why = due(
            self.store,
            self.name,
            triggers,
            num_new=num_new_rows(self.store, self.name, read_batch(data), folder=self.folder),
            data_digest=batch_digest(data),
            now=time.time(),
        )
        if why is None:
            raise _NotDueError
        return why

    def _data(self, asked: _Asked, folder: Path) -> tuple[str, ...]:
        """The files of new rows; of feedback one is written into the folder."""
        if asked.data and asked.feedback:
            raise ConfigError("--data and --feedback both say what is learned; give one of them")
        if asked.feedback:
            from gmpo.continual.plan import feedback_file

            path, told = feedback_file(self.store, self.name, folder)
            warn(f"feedback: {json.dumps(told)}")
            return (str(path),)
        if not asked.data:
            raise ConfigError(
                "no new rows are named: --data FILE or --feedback says what is learned"
            )
        return asked.data

    def _settings(self) -> ControllerSettings:
        from gmpo.continual import ControllerSettings

        return ControllerSettings(
            patience_seconds=self.wait_seconds,
            goes_on=_goes_on,
            tell=_tell,
            should_stop=self.work.should_stop,
            warn=warn,
        )


@contextmanager
def _opened(url: str, name: str, folder: Path | None, *, wait_seconds: float) -> Iterator[_Learner]:
    """The store, the registry beside it, and the work of cycles."""
    from gmpo.continual.work import RealWork
    from gmpo.registry import Registry
    from gmpo.terminal import asked_to_stop

    place = _place(url, folder)
    with (
        existing_store(url) as opened,
        asked_to_stop(warn, mended_by="the next call") as should_stop,
    ):
        registry = Registry(opened, place / "models", tell=warn)
        work = RealWork(
            store=opened,
            registry=registry,
            threads=threads_of_each(1),
            warn=warn,
            should_stop=should_stop,
        )
        yield _Learner(
            name=name,
            store=opened,
            folder=place / "learn" / name,
            work=work,
            wait_seconds=wait_seconds,
        )


def _place(url: str, folder: Path | None) -> Path:
    if folder is not None:
        return folder.absolute()
    path = url.removeprefix("sqlite:///")
    if "://" in path:
        raise ConfigError("--folder says where cycles and versions are kept with such a store")
    return Path(path).absolute().parent


def _require_gateway(plan: LearnPlan) -> None:
    """Refuse a gateway that does not answer before hours of training, not after them."""
    from gmpo.continual.traffic import open_client

    if plan.gateway is not None:
        with open_client(plan.gateway) as client:
            client.served()


def _suite(word: str) -> tuple[str, str]:
    name, equals, path = word.partition("=")
    if not (name and equals and path):
        raise ConfigError(f"--suite is {word!r}; it must be NAME=FILE")
    return name, str(Path(path).absolute())


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"plan {path} cannot be read: {error}") from None


def _triggers(rows: int | None, hours: float | None, on_drift: bool) -> Triggers:
    from gmpo.continual.triggers import Triggers

    seconds = None if hours is None else 3600 * hours
    return Triggers(min_rows=rows, every_seconds=seconds, on_drift=on_drift)


def _goes_on(cycle: Cycle) -> None:
    warn(
        f"cycle {cycle.number} goes on at {cycle.state}, by the plan it began with; options of a "
        "new cycle are not used (--abandon REASON ends it)"
    )


def _tell(step: str, moment: Moment, report: StepReport | None) -> None:
    if moment == "moved" and report is not None:
        say(step, report.sentence, style="green" if report.passed else "red")


def _print(result: CycleResult, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result.as_dict()))
        return
    why = f": {result.reason}" if result.reason else ""
    print(f"cycle {result.number} of {result.name}: {result.outcome}{why}")
    print(f"  {result.step}: {result.sentence}")


def _refuse_beside_demo(context: typer.Context) -> None:
    """Refuse what the demonstration would not follow."""
    followed = {"demo", "folder", "as_json"}
    given = [
        each.opts[0]
        for each in context.command.params
        if each.name is not None and each.name not in followed and is_given(context, each.name)
    ]
    if given:
        raise ConfigError(
            f"--demo brings a store, data and a plan of its own and does not follow "
            f"{', '.join(given)}; beside it only --folder and --json say anything"
        )


def _run_demo(folder: Path | None, *, as_json: bool) -> None:
    from gmpo.continual.demo import run_demo
    from gmpo.terminal import asked_to_stop
    from gmpo.tracking import fresh_folder

    place = (fresh_folder("learn-demo") if folder is None else folder).absolute()
    with asked_to_stop(warn, mended_by="the next call") as should_stop:
        cycles = run_demo(
            place, threads=threads_of_each(1), tell=_tell, warn=warn, should_stop=should_stop
        )
        try:
            for told in cycles:
                print(json.dumps(told) if as_json else _demo_lines(told), flush=True)
        except RunStopped:
            raise RunStopped(f"the demonstration was stopped; what it did is in {place}") from None
    warn(f"the trail: gmpo registry show demo --store {place / 'store.db'}")


def _demo_lines(told: dict[str, Any]) -> str:
    served = ", ".join(
        f"{name} {suite['accuracy']:.3f} of {suite['items']}"
        for name, suite in told["served"].items()
        if name != "version"
    )
    if not told["cycle"]:
        return f"start: served {served}"
    why = f": {told['reason']}" if told["reason"] else ""
    return (
        f"cycle {told['cycle']} ({told['data']}): {told['outcome']}{why}\n"
        f"  {told['step']}: {told['sentence']}\n"
        f"  served {served}; {told['traffic']['requests']} requests meanwhile, "
        f"{told['traffic']['failed']} failed; {told['seconds']:.0f} s so far"
    )
