"""The search of a tuning study: Optuna over one journal file, which several processes may share.

Each trial belongs to the process that holds its claim, a lock that ends with the process. What a
process that died was running is still there in the journal, and whoever asks next takes it over.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Literal

import numpy as np

from gmpo.errors import DependencyError, RunFolderError, StillHeld, StudyError
from gmpo.locks import Holder, holder_of, take_lock
from gmpo.tuning.plan import TuningPlan
from gmpo.tuning.score import FAILED, Score
from gmpo.tuning.space import Choices, Range, Space, Value

try:
    import optuna
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, TrialState
except ModuleNotFoundError as error:
    raise DependencyError(f"gmpo tune needs optuna ({error}); pip install 'gmpo[tune]'") from None

__all__ = ["ClaimedTrial", "Search", "TrialOutcome", "TrialRecord"]

TrialOutcome = Literal["scored", "diverged", "pruned", "refused", "unfinished"]
"""What became of a trial."""

_STUDY = "gmpo"
_OUTCOME = "outcome"
_REDUCTION = 2
_FEWEST_FOR_IMPORTANCE = 5
_LONGEST_ASKING_SECONDS = 60.0
"""That another call may take to draw a trial's values, which takes a second at the most."""
_STATES: Mapping[TrialState, TrialOutcome] = {
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "refused",
    TrialState.RUNNING: "unfinished",
}


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial, as the journal has it.

    Attributes:
        number: counted from 0.
        values: of the parameters.
        outcome: "scored" and "diverged" have a score; a diverged run's is 0.
        score: None without one.
        during: objective by round, of the evaluations that pruning looked at.
    """

    number: int
    values: Mapping[str, Value]
    outcome: TrialOutcome
    score: Score | None
    during: Mapping[int, float]

    @property
    def objective(self) -> float | None:
        """Of the finished run."""
        return None if self.score is None else self.score.objective


class Search:
    """The trials of a study folder.

    Attributes:
        folder: of the study; the journal is `journal.log` in it.
        plan: of the folder.

    Raises:
        RunFolderError: the journal cannot be read or written.
        StudyError: it is damaged.
        StillHeld: another call keeps it to itself for a minute; so does `claim_next`.
    """

    def __init__(self, folder: Path, plan: TuningPlan) -> None:
        self.folder = folder
        self.plan = plan
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # it would tell each trial on stderr
        (folder / "claims").mkdir(parents=True, exist_ok=True)
        journal = folder / "journal.log"
        try:
            with self._alone():
                storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
                self._study = optuna.create_study(
                    study_name=_STUDY,
                    storage=storage,
                    directions=["maximize"] * (2 if plan.is_pareto else 1),
                    pruner=_pruner(plan),
                    load_if_exists=True,
                )
                self._begin()
        except OSError as error:
            raise RunFolderError(
                f"{journal} cannot be written: {error.strerror}; free space or permissions"
            ) from None
        except ValueError as error:  # a JSON error is one of them
            raise StudyError(
                f"{journal} is damaged ({error}); remove its last line, or choose another --study"
            ) from None

    def claim_next(self, *, trials: int, except_for: Sequence[int] = ()) -> ClaimedTrial | None:
        """A trial that a dead process left, or a new one; None if neither is to be had.

        A new trial's values depend on the seed of the recipe, its number and the trials before it,
        not on which process asks.

        Args:
            trials: in all.
            except_for: numbers of trials that are not taken over.
        """
        with self._alone():
            begun = self._study.get_trials(deepcopy=False)
            for trial in begun:
                if trial.state is not TrialState.RUNNING or trial.number in except_for:
                    continue
                claim = self._claim(trial.number)
                if claim is not None:
                    self._seed(trial.number)
                    taken_over = optuna.trial.Trial(self._study, trial._trial_id)
                    return ClaimedTrial(taken_over, trial, self.plan.space, claim)
            if sum(trial.state is not TrialState.WAITING for trial in begun) >= trials:
                return None
            self._seed(len(begun))
            new = self._study.ask()
            claim = self._claim(new.number)
            assert claim is not None, "a trial that was just made is nobody's"
            return ClaimedTrial(new, None, self.plan.space, claim)

    def unfinished(self, *, except_for: Sequence[int]) -> list[int]:
        """Numbers of the trials that were begun and are not over, but for these."""
        begun = [record.number for record in self.records() if record.outcome == "unfinished"]
        return [number for number in begun if number not in except_for]

    def holder(self, number: int) -> Holder | None:
        """The process that claimed a trial last; None if it is not known."""
        return holder_of(self._claim_path(number))

    def records(self) -> list[TrialRecord]:
        """Every trial that was begun, in order."""
        trials = self._study.get_trials(deepcopy=False)
        return [_record(trial) for trial in trials if trial.state is not TrialState.WAITING]

    def front(self) -> list[int]:
        """Numbers of the trials that no other beats in accuracy and in stability."""
        scored = [record for record in self.records() if record.score is not None]
        return [
            one.number
            for one in scored
            if not any(_dominates(other.score, one.score) for other in scored)
        ]

    def importances(self) -> dict[str, float] | None:
        """Each parameter's share in what tells the best trials apart (PED-ANOVA), largest first.

        None where there are fewer than five scored trials, or they do not differ.
        """
        scored = [record for record in self.records() if record.score is not None]
        if len(scored) < _FEWEST_FOR_IMPORTANCE:
            return None
        # Five trials above the quantile are what makes the figure steady; never more than half.
        quantile = min(0.5, max(0.1, _FEWEST_FOR_IMPORTANCE / len(scored)))
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
        searched = [key for key, parameter in self.plan.space.items() if len(parameter.ends()) > 1]
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            found = optuna.importance.get_param_importances(
                self._study, evaluator=evaluator, params=searched
            )
        return None if notes else {key: float(share) for key, share in found.items()}

    def _begin(self) -> None:
        """The recipe itself is the first trial, if it lies in the space."""
        own = self.plan.own_values()
        if own is not None and not self._study.get_trials(deepcopy=False):
            self._study.enqueue_trial(dict(own))

    def _seed(self, number: int) -> None:
        """A sampler whose draws belong to the trial, so that a resumed search goes on alike."""
        seed = np.random.SeedSequence([self.plan.recipe.training.seed, number])
        self._study.sampler = optuna.samplers.TPESampler(seed=int(seed.generate_state(1)[0]))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from asking at the same time."""
        path = self.folder / "claims" / "ask.lock"
        gives_up = time.monotonic() + _LONGEST_ASKING_SECONDS
        with path.open("a", encoding="utf-8") as file:
            while not take_lock(file):
                if time.monotonic() > gives_up:
                    raise StillHeld(
                        f"{path} is held by {holder_of(path) or 'another process'}, which does "
                        "not get on; nothing is lost; end it, then give the same command again"
                    )
                time.sleep(0.01)
            yield

    def _claim(self, number: int) -> TextIOWrapper | None:
        file = self._claim_path(number).open("a", encoding="utf-8")
        if take_lock(file):
            return file
        file.close()
        return None

    def _claim_path(self, number: int) -> Path:
        return self.folder / "claims" / f"{number:04}.lock"


class ClaimedTrial:
    """A trial that this process runs, until it is told how it ended or released.

    Attributes:
        number: counted from 0.
        values: of the parameters.
        last_round: of the newest evaluation that has been reported; 0 for none.
    """

    def __init__(
        self,
        trial: optuna.trial.Trial,
        before: FrozenTrial | None,
        space: Space,
        claim: TextIOWrapper,
    ) -> None:
        self._trial = trial
        self._claim = claim
        self.number: int = trial.number
        self.values: dict[str, Value] = {
            key: _suggest(trial, key, parameter) for key, parameter in space.items()
        }
        self.last_round: int = max(before.intermediate_values, default=0) if before else 0

    def falls_behind(self, round_number: int, score: Score) -> bool:
        """Report an evaluation during training; whether the trial is to end there."""
        self._trial.report(score.objective, round_number)
        self.last_round = round_number
        return bool(self._trial.should_prune())

    def scored(self, score: Score) -> None:
        """The run was finished."""
        self._tell("scored", score)

    def diverged(self) -> None:
        """The run ended by itself without a usable policy, which scores 0."""
        self._tell("diverged", FAILED)

    def pruned(self) -> None:
        """The run was stopped because it fell behind."""
        self._trial.study.tell(self._trial, state=TrialState.PRUNED)
        self.release()

    def refused(self) -> None:
        """The values cannot be trained; the search goes on as if they had not been asked."""
        self._trial.study.tell(self._trial, state=TrialState.FAIL)
        self.release()

    def release(self) -> None:
        """Let another process have it."""
        self._claim.close()

    def _tell(self, outcome: TrialOutcome, score: Score) -> None:
        for name, value in (
            (_OUTCOME, outcome),
            ("accuracy", score.accuracy),
            ("stability", score.stability),
        ):
            self._trial.set_user_attr(name, value)
        has_two = len(self._trial.study.directions) > 1
        values = [score.accuracy, score.stability] if has_two else score.objective
        self._trial.study.tell(self._trial, values)
        self.release()


def _pruner(plan: TuningPlan) -> optuna.pruners.BasePruner:
    if not plan.prunes:
        return optuna.pruners.NopPruner()
    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=plan.rounds_between, reduction_factor=_REDUCTION
    )


def _suggest(trial: optuna.trial.Trial, key: str, parameter: Range | Choices) -> Value:
    if isinstance(parameter, Range):
        return trial.suggest_float(key, parameter.low, parameter.high, log=parameter.log)
    chosen = trial.suggest_categorical(key, parameter.values)
    assert isinstance(chosen, int | float | str)
    return chosen


def _record(trial: FrozenTrial) -> TrialRecord:
    outcome: TrialOutcome = _STATES.get(trial.state) or trial.user_attrs[_OUTCOME]
    has_score = trial.state is TrialState.COMPLETE
    return TrialRecord(
        number=trial.number,
        values=dict(trial.params),
        outcome=outcome,
        score=Score(accuracy=trial.user_attrs["accuracy"], stability=trial.user_attrs["stability"])
        if has_score
        else None,
        during={r: v for r, v in trial.intermediate_values.items() if math.isfinite(v)},
    )


def _dominates(other: Score | None, one: Score | None) -> bool:
    assert other is not None
    assert one is not None
    pair, own = (other.accuracy, other.stability), (one.accuracy, one.stability)
    return pair != own and all(a >= b for a, b in zip(pair, own, strict=True))
