"""Traffic split by an experiment of the store: assignment, exposures and outcomes."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from gmpo.abtest.assignment import assign
from gmpo.abtest.plan import ExperimentPlan, plan_of
from gmpo.abtest.records import PRESUMED
from gmpo.errors import ConfigError, GmpoError, StoreError
from gmpo.live_shadow import CONTROLLER_SESSION
from gmpo.serving.answer_record import AnswerRecord
from gmpo.serving.backend import GenerationRequest
from gmpo.serving.router import Route
from gmpo.serving.supervision import Outage
from gmpo.store import Event, Experiment, Store

__all__ = ["TrafficSplit", "outcome_event"]

_CLIENT_LEFT = 499
_REFUSED = 400


class TrafficSplit:
    """Assigns units by a running experiment, and follows its changes in the store.

    A stopped experiment leaves all traffic to the backend that is asked first anyway; one whose
    hours are over (`end_after_hours`) gives everybody control, whatever was assigned before, and
    records nothing more, until somebody stops it. New weights move only the units at the border.
    While the store cannot be read, what was read last goes on.

    Args:
        store: where the experiment is.
        name: of the experiment.
        backend_of: backend's name for each model that an arm may name.
        put: takes events without waiting.
        tell: told in one sentence of what changed or cannot be done.
        clock: unix seconds, as the experiment's begin.

    Raises:
        ConfigError: there is no such experiment, or an arm's model is no backend.
        StoreError: the store cannot be read.
    """

    max_units = 100_000
    """Units remembered as exposed; one that was forgotten is exposed again, which does no harm."""

    def __init__(
        self,
        store: Store,
        name: str,
        *,
        backend_of: Mapping[str, str],
        put: Callable[[Event], None],
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._name = name
        self._backend_of = dict(backend_of)
        self._put = put
        self._tell = tell
        self._clock = clock
        self._seen: Experiment | None = None
        self._plan: ExperimentPlan | None = None
        self._ends: float | None = None
        self._is_end_told = False
        self.counts: Counter[str] = Counter()
        """Requests that got control because the hours were over (`after_experiment`), those of
        cycles of continual learning, which are in no arm (`not_split`), and looks at which the
        experiment could not be read (`experiment_unread`)."""
        self._exposed: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._outage = Outage(tell)
        self._take(self._read())

    @property
    def num_failures(self) -> int:
        """Looks at which the experiment could not be read; the next one may."""
        return self._outage.num_failures

    @property
    def plan(self) -> ExperimentPlan | None:
        """What traffic is split by now; None while the experiment does not run."""
        return self._plan

    def assign(self, request: GenerationRequest) -> Route | None:
        """The request's route, by its unit; a unit that is seen first is recorded as exposed.

        Requests of a cycle of continual learning are no unit's: they ask the model that is served.
        """
        plan = self._plan
        if plan is None:
            return None
        if request.session == CONTROLLER_SESSION:
            self.counts["not_split"] += 1
            return None
        if self.is_over:
            self._tell_end(plan)
            self.counts["after_experiment"] += 1
            return Route(backend=self._backend_of[plan.models["control"]])
        variant = assign(self._name, plan.salt, request.unit, plan.weights)
        self._expose(request, variant, plan.weights[variant])
        backends = {arm: self._backend_of[model] for arm, model in plan.models.items()}
        return Route(
            backend=backends[variant],
            experiment=self._name,
            variant=variant,
            variants={backend: arm for arm, backend in backends.items()},
        )

    @property
    def is_over(self) -> bool:
        """Whether it runs no more because its hours are over."""
        is_late = self._ends is not None and self._clock() >= self._ends
        return is_late and self._plan is not None

    def state(self) -> dict[str, Any]:
        """Its name, how it stands, and when its hours end in unix seconds (None: they do not).

        The status is running, over (its hours are), stopped, or unusable: no plan that could be
        followed here.
        """
        stopped = self._seen is not None and self._seen.status == "stopped"
        status = "over" if self.is_over else "running"
        if self._plan is None:
            status = "stopped" if stopped else "unusable"
        return {"name": self._name, "status": status, "ends": self._ends}

    async def run(self, *, seconds: float = 2.0) -> None:
        """Follow the experiment until cancelled, so many seconds between two looks."""
        while True:
            await asyncio.sleep(seconds)
            await self.look()

    async def look(self) -> None:
        """Take over what has changed in the store."""
        try:
            found = await asyncio.to_thread(self._read)
        except (StoreError, ConfigError) as error:
            reason = f"experiment {self._name!r} cannot be read, and goes on as is: {error}"
            self._outage.goes_on(reason)
            self.counts["experiment_unread"] += 1
            return
        self._outage.is_over(f"experiment {self._name!r} can be read again")
        if found == self._seen:
            if self._plan is not None and self.is_over:
                self._tell_end(self._plan)
            return
        try:
            self._take(found)
        except GmpoError as error:
            self._seen, self._plan, self._ends = found, None, None
            self._tell(f"traffic is split no longer: {error}")

    def _read(self) -> Experiment:
        found = self._store.experiment(self._name)
        if found is None:
            names = ", ".join(one.name for one in self._store.experiments()) or "none yet"
            raise ConfigError(
                f"there is no experiment {self._name!r}; there are: {names}; begin one with gmpo "
                "ab start"
            )
        return found

    def _take(self, found: Experiment) -> None:
        plan = plan_of(found.config)
        unknown = [model for model in plan.models.values() if model not in self._backend_of]
        if unknown:
            raise ConfigError(
                f"experiment {self._name!r} compares {unknown[0]!r}, which is no backend here; "
                f"there are: {', '.join(self._backend_of)}"
            )
        if len({self._backend_of[model] for model in plan.models.values()}) < len(plan.models):
            raise ConfigError(f"both arms of experiment {self._name!r} are one backend")
        before = None if self._is_end_told else self._plan
        self._seen = found
        self._plan = plan if found.status == "running" else None
        self._ends, self._is_end_told = plan.ends(found.created), False
        if self._plan is None:
            self._tell(f"experiment {self._name!r} does not run; its arms get no traffic of theirs")
        elif self.is_over:
            self._tell_end(plan)
        elif before is None or before.weights != plan.weights:
            shares = ", ".join(
                f"{100 * plan.weights[arm]:g} % {plan.models[arm]}" for arm in plan.models
            )
            self._tell(f"experiment {self._name!r} splits traffic: {shares}")

    def _tell_end(self, plan: ExperimentPlan) -> None:
        """Say once that its hours are over."""
        if self._is_end_told:
            return
        self._is_end_told = True
        self._tell(
            f"the {plan.end_after_hours:g} hours of experiment {self._name!r} are over: everybody "
            f"gets control ({plan.models['control']}) from now on; see gmpo ab report "
            f"{self._name}, and end it with gmpo ab stop"
        )

    def _expose(self, request: GenerationRequest, variant: str, weight: float) -> None:
        key = variant, request.unit
        if key in self._exposed:
            self._exposed.move_to_end(key)
            return
        self._exposed[key] = None
        if len(self._exposed) > self.max_units:
            self._exposed.popitem(last=False)
        payload: dict[str, Any] = {"variant": variant, "weight": weight}
        if request.covariate is not None:
            payload["covariate"] = request.covariate
        self._put(
            Event(
                kind="exposure",
                time=time.time(),
                payload=payload,
                experiment=self._name,
                unit=request.unit,
                request_id=request.id,
            )
        )


def outcome_event(record: AnswerRecord) -> Event | None:
    """What an answer that is over says about the variant that was assigned; None outside of one.

    Success is the verdict where the answer was verified; else 1 for a whole answer whose quality is
    not low, 0 for one of low quality and for a request that nobody answered. A request that was
    not allowed, or whose client left, says nothing: its success is None. `judged_by` says which of
    these it was.
    """
    report = record.report
    if report.experiment is None:
        return None
    is_whole = record.status < _REFUSED
    success, judged_by = _success(record)
    return Event(
        kind="outcome",
        # At its end: an outcome comes after the exposure, which waited for its turn.
        time=record.time + record.latency_seconds,
        payload={
            "variant": report.assigned_variant,
            "served_variant": report.served_variant,
            "fell_back": report.fell_back,
            "success": success,
            "judged_by": judged_by,
            "quality": report.quality if is_whole else None,
            "latency_s": record.latency_seconds if is_whole else None,
            "session": record.request.session,
        },
        model_version=report.model_version,
        experiment=report.experiment,
        unit=record.request.unit,
        request_id=record.request.id,
    )


def _success(record: AnswerRecord) -> tuple[int | None, str | None]:
    """Success, and what it comes from."""
    if record.status in (_REFUSED, _CLIENT_LEFT):
        return None, None
    if record.status > _REFUSED:
        return 0, "fault"
    verified = record.report.quality_components.get("verified")
    if verified is not None:
        return int(verified), "verifier"
    if record.report.is_low_quality:
        return 0, "quality"
    return 1, PRESUMED
