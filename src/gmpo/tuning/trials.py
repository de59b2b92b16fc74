"""A tuning study's runs: trials of the search, then the best of them against the recipe itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gmpo.errors import RunStopped, StudyError
from gmpo.locks import holder_of, take_lock
from gmpo.run_process import (
    MOST_TRIES,
    RunProcess,
    death,
    drop_weights,
    is_trained_in,
)
from gmpo.study import run_study
from gmpo.study.plan import Arm, StudyPlan
from gmpo.study.wait import WAIT_MINUTES, Held, Patience, signs_of_runs
from gmpo.tracking import RunFolder
from gmpo.tuning.plan import TuningPlan
from gmpo.tuning.score import final_score, scores_during
from gmpo.tuning.search import ClaimedTrial, Search, TrialRecord

__all__ = [
    "OWN",
    "arm_name",
    "candidates",
    "judge",
    "judged_folder",
    "judged_plan",
    "run_trials",
    "trial_folder",
    "trial_name",
]

OWN = "recipe"
"""Name of the arm that is the recipe itself."""

_POLL_SECONDS = 0.2
_DROPPED = (
    "gmpo tune keeps no weights of trials and comparisons; winner.toml of the study trains its best"
)
_Say = Callable[[str], None]


def trial_folder(study: Path, number: int) -> Path:
    """The run folder of a trial."""
    return study / "trials" / trial_name(number)


def trial_name(number: int) -> str:
    """Of its folder."""
    return f"{number:04}"


def judged_folder(study: Path) -> Path:
    """Where the runs of the last comparison lie: a study of its own, of arms and seeds."""
    return study / "judged"


def arm_name(number: int) -> str:
    """Of a candidate in the last comparison."""
    return f"trial-{trial_name(number)}"


def run_trials(
    search: Search,
    *,
    trials: int,
    processes: int = 1,
    wait_minutes: float = WAIT_MINUTES,
    say: _Say = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Run trials until there are as many as asked for; names of those not brought to an end.

    A trial whose process dies goes on from its newest checkpoint, until `MOST_TRIES` processes of
    one call have died on it. Every end of a process is a line of `attempts.jsonl`. Several calls
    may work on one study at a time; each runs trials of its own, then waits for those of the
    others, and takes over what one that dies leaves.

    Args:
        search: of the study.
        trials: in all, those of earlier calls among them.
        processes: at a time.
        wait_minutes: for trials of other calls, while nothing comes of them; 0 does not wait.
        say: told in one sentence what happens.
        should_stop: asked a few times a second; once it says so, running trials save and end.

    Raises:
        RunStopped: `should_stop` said so.
        StudyError: no trial can be trained; the first one's message is named.
        StillHeld: other calls hold trials of which nothing comes.
        RunFolderError: the folder cannot be written.
    """
    crew = _Crew(search, say=say, patience=_patience(search, minutes=wait_minutes, say=say))
    try:
        crew.run(trials=trials, processes=processes, should_stop=should_stop)
    finally:
        crew.kill()
    return [trial_name(number) for number in sorted(crew.given_up)]


def candidates(search: Search) -> list[TrialRecord]:
    """The trials that are judged, best objective first; of two objectives only the front's.

    Trials with the recipe's own values are none, nor is a second trial with another's values.
    """
    plan = search.plan
    front = set(search.front()) if plan.is_pareto else None
    scored = [
        record
        for record in search.records()
        if record.outcome == "scored" and (front is None or record.number in front)
    ]
    scored.sort(key=lambda record: (-(record.objective or 0.0), record.number))
    chosen: list[TrialRecord] = []
    seen = [plan.own_values()]
    for record in scored:
        if record.values not in seen and len(chosen) < plan.top:
            chosen.append(record)
            seen.append(dict(record.values))
    return chosen


def judged_plan(plan: TuningPlan, chosen: Sequence[TrialRecord]) -> StudyPlan:
    """The last comparison: recipe and candidates, fresh seeds, items that no trial asked."""
    arms = [Arm(label=OWN, recipe=plan.judged_recipe({}))]
    arms += [
        Arm(label=arm_name(record.number), recipe=plan.judged_recipe(record.values))
        for record in chosen
    ]
    return StudyPlan(
        source=plan.source,
        arms=tuple(arms),
        seeds=plan.seeds,
        target_reward=None,
        is_quick=False,
        threads=plan.threads,
    )


def judge(
    search: Search,
    chosen: Sequence[TrialRecord],
    *,
    processes: int = 1,
    wait_minutes: float = WAIT_MINUTES,
    say: _Say = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Run the last comparison; names of runs that could not be brought to an end.

    One call at a time: the next one waits, and finds the runs done, or goes on with them.

    Raises:
        RunStopped: `should_stop` said so.
        StudyError: a run refused to train.
        StillHeld: another call holds the comparison, or a process that one left holds a run of
            it, and nothing comes of that.
        RunFolderError: the folder cannot be written.
    """
    stopped = RunStopped(f"the last comparison was stopped; {_go_on(search.folder)}")
    patience = _patience(search, minutes=wait_minutes, say=say)
    lock, judged = search.folder / "claims" / "judge.lock", judged_folder(search.folder)
    with lock.open("a", encoding="utf-8") as file:
        while not take_lock(file):
            signs = signs_of_runs(judged, judged / "runs")
            patience.wait_for(
                [Held(what="the last comparison", holder=holder_of(lock), signs=signs)]
            )
            if should_stop():
                raise stopped
            time.sleep(_POLL_SECONDS)
        try:
            return run_study(
                judged,
                judged_plan(search.plan, chosen),
                jobs=processes,
                patience=patience,
                say=say,
                should_stop=should_stop,
            )
        except RunStopped:
            raise stopped from None


@dataclass(kw_only=True)
class _Running:
    """A trial of this call, and its process while it has one."""

    trial: ClaimedTrial
    process: RunProcess | None = None
    deaths: int = 0
    size_seen: int = 0
    """Of `metrics.jsonl`, in bytes: an unchanged file is not read again."""


class _Crew:
    """The trials that this call runs."""

    def __init__(self, search: Search, *, say: _Say, patience: Patience) -> None:
        self._folder = RunFolder(search.folder)
        self._plan = search.plan
        self._search = search
        self._say = say
        self._running: dict[int, _Running] = {}
        self._patience = patience
        self.given_up: list[int] = []

    def run(self, *, trials: int, processes: int, should_stop: Callable[[], bool]) -> None:
        """Run what there is, a few at a time."""
        while True:
            if should_stop():
                self._stop()
            while len(self._running) < processes and self._claim(trials):
                pass
            held = self._held()
            if not self._running and not held:
                return
            self._patience.wait_for(held)
            for running in list(self._running.values()):
                self._look_after(running)
            time.sleep(_POLL_SECONDS)

    def kill(self) -> None:
        """End what is still running at once; a later call goes on from its checkpoints."""
        for running in self._running.values():
            if running.process is not None:
                running.process.kill()
            running.trial.release()

    def _claim(self, trials: int) -> bool:
        """Take on one more trial, if there is one."""
        mine = [*self._running, *self.given_up]
        trial = self._search.claim_next(trials=trials, except_for=mine)
        if trial is None:
            return False
        running = self._running[trial.number] = _Running(trial=trial)
        shown = ", ".join(f"{key} {_shown(value)}" for key, value in trial.values.items())
        self._say(f"trial {trial.number}: {shown}")
        if self._is_trained(running):
            # Left by a call that was killed, where no leash ends it: let it finish.
            self._say(f"trial {trial.number} is still trained by an earlier call; waiting for it")
        return True

    def _held(self) -> list[Held]:
        """What this call waits for, while it has nothing else to do.

        Trials that other calls hold fall to this one if those calls die; those that it has taken
        over may be trained still by a process that an earlier call left.
        """
        left = [r for r in self._running.values() if r.process is None and self._is_trained(r)]
        if len(left) < len(self._running):
            return []
        others = self._search.unfinished(except_for=[*self.given_up, *self._running])
        held = [(number, self._search.holder(number)) for number in others]
        held += [(running.trial.number, None) for running in left]
        folder = self._folder.path
        return [
            Held(
                what=f"trial {number}",
                holder=holder,
                signs=signs_of_runs(folder, folder / "trials", trial_name(number)),
            )
            for number, holder in held
        ]

    def _look_after(self, running: _Running) -> None:
        """Start a trial's process, see how it does, or take down how it ended."""
        if running.process is None:
            if not self._is_trained(running):
                running.process = RunProcess.start(
                    self._folder.path,
                    trial_name(running.trial.number),
                    self._plan.trial_recipe(running.trial.values),
                    run=self._run_of(running),
                    threads=self._plan.threads,
                )
            return
        has_ended = running.process.has_ended  # asked first: its last lines are then written
        if self._plan.prunes and self._falls_behind(running):
            self._prune(running, running.process)
        elif has_ended:
            self._ended(running, running.process)

    def _falls_behind(self, running: _Running) -> bool:
        """Whether one of the evaluations since the last look says that the trial is to end."""
        run, trial = self._run_of(running), running.trial
        metrics = run / "metrics.jsonl"
        size = metrics.stat().st_size if metrics.is_file() else 0
        if size == running.size_seen:
            return False
        running.size_seen = size
        recipe = self._plan.trial_recipe(trial.values)
        found = scores_during(run, recipe, kind=self._plan.stability, after=trial.last_round)
        # Whoever has come to the last round is scored in full: ending there would save nothing.
        early = {r: score for r, score in found.items() if r < recipe.training.rounds}
        return any(trial.falls_behind(number, early[number]) for number in sorted(early))

    def _prune(self, running: _Running, process: RunProcess) -> None:
        trial = running.trial
        process.kill()
        attempt = replace(process.attempt(), outcome="stopped", message="pruned")
        self._folder.log_record("attempts.jsonl", asdict(attempt))
        drop_weights(self._run_of(running), why=_DROPPED)
        trial.pruned()
        del self._running[trial.number]
        self._say(f"trial {trial.number} is behind after round {trial.last_round}: pruned")

    def _ended(self, running: _Running, process: RunProcess) -> None:
        """Write down how a process ended, and tell the search of a trial that is over."""
        trial = running.trial
        attempt = process.attempt()
        running.process = None
        self._folder.log_record("attempts.jsonl", asdict(attempt))
        if attempt.outcome == "stopped":
            raise RunStopped(f"trial {trial.number} was asked to stop; {_go_on(self._folder.path)}")
        if attempt.outcome == "died":
            self._died(running, attempt.exit_code)
            return
        if attempt.outcome == "refused":
            trial.refused()
            self._require_a_trial(process, attempt.message)
            said = f"cannot be trained and is left out: {attempt.message}"
        elif attempt.outcome == "diverged":
            trial.diverged()
            said = f"ended without a policy and scores 0: {attempt.message}"
        else:
            recipe = self._plan.trial_recipe(trial.values)
            score = final_score(self._run_of(running), recipe, kind=self._plan.stability)
            trial.scored(score)
            said = (
                f"scores {score.objective:.4f} (accuracy {score.accuracy:.3f}, stability "
                f"{score.stability:.3f})"
            )
        drop_weights(self._run_of(running), why=_DROPPED)
        del self._running[trial.number]
        self._say(f"trial {trial.number} {said}")

    def _died(self, running: _Running, exit_code: int) -> None:
        running.deaths += 1
        again = running.deaths < MOST_TRIES
        self._say(
            f"trial {running.trial.number}'s process died ({death(exit_code)}), {running.deaths} "
            f"of at most {MOST_TRIES} times; "
            + ("it is started again from its newest checkpoint" if again else "given up for now")
        )
        if not again:
            self.given_up.append(running.trial.number)
            running.trial.release()
            del self._running[running.trial.number]

    def _require_a_trial(self, process: RunProcess, message: str) -> None:
        """A first trial that is refused is the recipe's fault, and so would be all others."""
        others = [record.outcome for record in self._search.records()]
        if any(outcome in ("scored", "diverged", "pruned") for outcome in others):
            return
        raise StudyError(
            f"trial {process.name} cannot be trained: {message}. Its output is in {process.log}; "
            "mend the recipe or the space and choose another --study"
        )

    def _is_trained(self, running: _Running) -> bool:
        return is_trained_in(self._run_of(running))

    def _run_of(self, running: _Running) -> Path:
        return trial_folder(self._folder.path, running.trial.number)

    def _stop(self) -> None:
        """Let every running process finish its round and save, as Ctrl-C on it would."""
        processes = [r.process for r in self._running.values() if r.process is not None]
        for process in processes:
            process.interrupt()
        for process in processes:
            process.process.wait()
            # One that died was asked before it could listen; all others that ended say how.
            attempt = process.attempt()
            if attempt.outcome == "died":
                attempt = replace(attempt, outcome="stopped")
            self._folder.log_record("attempts.jsonl", asdict(attempt))
        for running in self._running.values():
            running.trial.release()
        self._running.clear()
        raise RunStopped(f"the study was stopped; {_go_on(self._folder.path)}")


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _patience(search: Search, *, minutes: float, say: _Say) -> Patience:
    return Patience(minutes=minutes, say=say, go_on=_go_on(search.folder))


def _go_on(study: Path) -> str:
    return f"what is done is kept; go on with: gmpo tune --study {study}"
