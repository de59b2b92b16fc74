"""The steps of a cycle with real models: GMPO training, evaluation, gate, registry, servers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gmpo.continual.anchor import find_anchor, require_anchor
from gmpo.continual.batch import apart_from_suites, champion_sampler, checked_batch
from gmpo.continual.cycle import learning_champion
from gmpo.continual.live import live_step, watch_step
from gmpo.continual.plan import (
    LearnPlan,
    batch_digest,
    mixed_rows,
    plan_of,
    read_batch,
    require_traffic,
    small_recipe,
    suites_of,
    update_recipe,
    write_rows,
)
from gmpo.continual.records import CycleFacts, StepReport
from gmpo.continual.release import (
    Compared,
    approve_step,
    gate_step,
    is_compared,
    kept_or_withdrawn,
    promote_step,
    read_compared,
    require_decidable,
    roll_back_step,
    write_compared,
)
from gmpo.continual.rows_had import keep_digests
from gmpo.continual.suites import (
    ModelAsked,
    completion_lengths,
    require_apart,
    some_items,
    success_shares,
)
from gmpo.continual.trained_on import TRAINED_ROWS
from gmpo.continual.training import stability_metrics, train_run, trained_model
from gmpo.errors import ConfigError, DataError, ModelError
from gmpo.gate import decide_gate
from gmpo.gate.records import Guardrail, PairedSuite, SafetyCount
from gmpo.outcomes import SuiteOutcomes
from gmpo.own_servers import require_serving
from gmpo.registry import Registry, commands_for
from gmpo.run_process import drop_weights
from gmpo.store import Store

__all__ = ["RealWork", "cycle_request", "dry_run"]

_ACCEPTED = "accepted.jsonl"
_REJECTED = "rejected.jsonl"


def cycle_request(plan: LearnPlan, data: Sequence[str], *, trigger: str) -> dict[str, Any]:
    """What a cycle is asked to do, as its row in the store keeps it.

    Args:
        plan: of the cycle.
        data: files of the new rows.
        trigger: why it begins now.

    Raises:
        ConfigError: the suites are too small for the margin, or share an item.
        DataError: a file is missing or unreadable, there is no new row, a row of a suite is not
            usable, or `traffic` has too few.
        DependencyError: there is a gateway, and the extra `serve` is not installed.
    """
    _checked_files(plan)
    # A cycle that has begun has to be brought to its end, so nothing begins with nothing, nor with
    # files that are not there.
    if plan.replay:
        read_batch(plan.replay)
    if not read_batch(data):
        raise DataError(
            f"there is no new row in {', '.join(map(str, data))}; no cycle was begun: give rows, "
            "or wait until answers are confirmed"
        )
    return {
        "plan": plan.model_dump(mode="json"),
        "data": [str(Path(path).absolute()) for path in data],
        "data_digest": batch_digest(data),
        "trigger": trigger,
    }


def dry_run(
    plan: LearnPlan, data: Sequence[str], work: RealWork, *, name: str, folder: Path
) -> dict[str, Any]:
    """What a cycle would find in the data, and what it would do; nothing is trained or stored.

    Args:
        plan: of the cycle.
        data: files of the new rows.
        work: of the model's cycles.
        name: of the model.
        folder: of all cycles of the model.

    Raises:
        ConfigError: the model has no champion, or the suites are too small for the margin or share
            an item.
        DataError: a file is missing or unreadable, the batch is empty, or `traffic` has too few
            rows.
        DependencyError: there is a gateway, and the extra `serve` is not installed.
        ModelError: the champion's files are damaged.
    """
    champion = learning_champion(work.store, name)
    sizes, needed = _checked_files(plan)
    check = work.registry.verify(champion.version)
    if not check.is_whole:
        raise ModelError(
            f"nothing could be learned: champion {check.sentence}; {work.registry.way_out(name)}"
        )
    asked = work.asked_before(plan, folder)
    require_anchor(work.store, plan, name=name, asked=asked, folder_of=work.folder_of)
    earlier = work.earlier_rows(plan, name=name, folder=folder)
    report = checked_batch(
        plan,
        read_batch(data),
        earlier,
        sampler=champion_sampler(plan, Path(work.folder_of(champion.version)), warn=work.warn),
        seed=0,
    )
    step = report.step(min_rows=plan.min_rows)
    again, left_out = apart_from_suites(earlier, plan)
    trained = mixed_rows(report.accepted, again, replay_share=plan.replay_share, seed=0)
    return {
        "champion": champion.version,
        "data_passes": step.passed,
        "data": step.sentence,
        "trained_rows": len(trained),
        "earlier_rows_left_out": left_out,
        "rounds": plan.recipe.training.rounds,
        "suites": sizes,
        "items_needed_at_least": dict(needed),
        "anchor": plan.anchor,
        "approval": plan.approval,
        "gateway": plan.gateway,
    }


def _checked_files(plan: LearnPlan) -> tuple[dict[str, int], Mapping[str, int]]:
    """Items of each suite, and those that are needed, of files that can decide a cycle."""
    suites = suites_of(plan)
    require_apart(suites)
    require_traffic(plan)
    if plan.gateway is not None:
        require_serving("the live test, which serves the candidate,")
    sizes = {suite: len(items) for suite, items in suites.items()}
    return sizes, require_decidable(sizes, policy=plan.gate_policy(), samples=plan.samples)


@dataclass(frozen=True, kw_only=True)
class RealWork:
    """`CycleWork` on models in folders; what is done is the plan that the cycle keeps.

    Attributes:
        store: of cycles, versions and events.
        registry: of the versions.
        threads: CPU threads of training and of the candidate's server.
        warn: told in one sentence what is not as expected.
        should_stop: asked while a run trains.
    """

    store: Store
    registry: Registry
    threads: int
    warn: Callable[[str], None] = lambda _: None
    should_stop: Callable[[], bool] = lambda: False

    def validate(self, facts: CycleFacts, folder: Path) -> StepReport:
        """Check the new rows against each other, earlier data, the suites and the champion."""
        plan, data = plan_of(facts.request["plan"]), facts.request["data"]
        if batch_digest(data) != facts.request["data_digest"]:
            raise ConfigError(
                f"{', '.join(data)} changed since cycle {facts.number} began; put the old rows "
                "back, or end the cycle with gmpo learn --abandon"
            )
        begin_another = (
            f"then, if another version serves, end this cycle with gmpo learn --name {facts.name} "
            "--store STORE --abandon REASON, and begin another"
        )
        self.require_whole(facts.name, facts.champion, then=begin_another)
        asked = self.asked_before(plan, facts.folder.parent)
        require_anchor(self.store, plan, name=facts.name, asked=asked, folder_of=self.folder_of)
        rows = read_batch(data)
        report = checked_batch(
            plan,
            rows,
            self._earlier(facts, plan),
            sampler=champion_sampler(plan, Path(self._champion(facts)), warn=self.warn),
            seed=facts.number,
        )
        keep_digests(rows, folder)
        write_rows(folder / _ACCEPTED, [dict(row) for row in report.accepted])
        # Some are rejected for the personal data in them.
        write_rows(folder / _REJECTED, report.rejected, is_private=True)
        if report.rejected:
            where = facts.files("validate") / _REJECTED
            self.warn(f"the {len(report.rejected)} rejected rows and why: {where}")
        return report.step(min_rows=plan.min_rows)

    def small_update(self, facts: CycleFacts, folder: Path) -> StepReport:
        """Train a little on the first rows, at the full step size."""
        plan = plan_of(facts.request["plan"])
        rows = _accepted(facts)[: plan.small_rows]
        write_rows(folder / TRAINED_ROWS, _own_ids(rows))
        recipe = small_recipe(
            plan,
            model=self._champion(facts),
            rows=folder / TRAINED_ROWS,
            number=facts.number,
        )
        run = train_run(folder, recipe, threads=self.threads, should_stop=self.should_stop)
        if run.outcome == "diverged":
            return StepReport(passed=False, sentence=f"the small update diverged: {run.message}")
        return StepReport(
            passed=True,
            sentence=f"{recipe.training.rounds} rounds on {len(rows)} rows",
            details={"stability_metrics": stability_metrics(run.folder, recipe)},
        )

    def safety_test(self, facts: CycleFacts, folder: Path) -> StepReport:
        """Ask champion and small update some items of each suite; a shown drop is not safe."""
        plan = plan_of(facts.request["plan"])
        suites = {
            name: some_items(items, plan.safety_items, seed="safety")
            for name, items in suites_of(plan).items()
        }
        if not is_compared(folder):
            small = trained_model(facts.files("small_update") / "run", merged=folder / "merged")
            asked = self._asked(folder / "outcomes", plan)
            write_compared(
                folder,
                _compared(
                    self.asked_before(plan, facts.folder.parent).outcomes(
                        facts.champion, Path(self._champion(facts)), suites
                    ),
                    asked.outcomes("small", small, suites),
                ),
            )
        _drop_run(facts.files("small_update"), folder / "merged")
        compared = read_compared(folder)
        decision = decide_gate(
            compared.suites,
            policy=plan.gate_policy(),
            champion=facts.champion,
            candidate=f"small update of cycle {facts.number}",
            guardrails=compared.guardrails,
        )
        return StepReport(
            passed=decision.outcome != "fail",
            sentence=decision.sentence,
            details={"is_safe": decision.outcome != "fail", "decision": decision.as_dict()},
        )

    def update(self, facts: CycleFacts, folder: Path) -> StepReport:
        """Train the candidate on new and earlier rows, and register it."""
        plan = plan_of(facts.request["plan"])
        earlier, left_out = apart_from_suites(self._earlier(facts, plan), plan)
        if left_out:
            self.warn(f"{left_out} earlier rows hold an item of a suite, and are left out")
        rows = mixed_rows(
            _accepted(facts), earlier, replay_share=plan.replay_share, seed=facts.number
        )
        write_rows(folder / TRAINED_ROWS, rows)
        recipe = update_recipe(
            plan, model=self._champion(facts), rows=folder / TRAINED_ROWS, number=facts.number
        )
        run = train_run(folder, recipe, threads=self.threads, should_stop=self.should_stop)
        if run.outcome == "diverged":
            return StepReport(passed=False, sentence=f"the update diverged: {run.message}")
        figures = stability_metrics(run.folder, recipe)
        new = sum(row["id"].startswith("new-") for row in rows)
        version = self.registry.add(
            trained_model(run.folder, merged=folder / "merged"),
            name=facts.name,
            parent=facts.champion,
            lineage={
                "cycle": facts.number,
                "data": facts.request["data"],
                "data_digest": facts.request["data_digest"],
                "rows": {"new": new, "replay": len(rows) - new, "left_out": left_out},
                "recipe": recipe.model_dump(mode="json", exclude_none=True),
            },
            metrics={"stability": figures["stability"]},
        )
        if version.version == facts.champion:
            return StepReport(
                passed=False,
                sentence="the update left the weights as they were: no group had rewards that "
                "differ; the data are too easy or too hard for the model",
                details={"stability_metrics": figures},
            )
        return StepReport(
            passed=True,
            sentence=f"version {version.version} by {recipe.training.rounds} rounds on {new} new "
            f"and {len(rows) - new} earlier rows",
            details={"new_model_version": version.version, "stability_metrics": figures},
        )

    def evaluate(self, facts: CycleFacts, folder: Path) -> StepReport:
        """Ask champion and candidate every item of every suite."""
        plan = plan_of(facts.request["plan"])
        _drop_run(facts.files("update"), facts.files("update") / "merged")
        asked, suites = self.asked_before(plan, facts.folder.parent), suites_of(plan)
        champion = asked.outcomes(facts.champion, Path(self._champion(facts)), suites)
        candidate = asked.outcomes(facts.candidate, Path(self.folder_of(facts.candidate)), suites)
        counts = self._safety_counts(self.folder_of(facts.candidate), plan)
        compared = replace(_compared(champion, candidate), safety=counts)
        anchor = find_anchor(
            self.store, facts, plan, asked=asked, suites=compared.suites, folder_of=self.folder_of
        )
        compared = replace(compared, anchor=anchor)
        write_compared(folder, compared)
        return StepReport(
            passed=True,
            sentence="; ".join(
                f"{suite.suite} {suite.champion.mean():.3f} to {suite.candidate.mean():.3f} on "
                f"{len(suite.champion)} items"
                for suite in compared.suites
            ),
            details={
                suite.suite: {
                    "champion": float(suite.champion.mean()),
                    "candidate": float(suite.candidate.mean()),
                    "items": len(suite.champion),
                }
                for suite in compared.suites
            },
        )

    def gate(self, facts: CycleFacts, folder: Path) -> StepReport:
        """Decide by the outcomes."""
        policy = plan_of(facts.request["plan"]).gate_policy()
        return gate_step(facts, self.registry, policy=policy)

    def live_test(self, facts: CycleFacts, folder: Path) -> StepReport:
        """Run the candidate in the champion's shadow."""
        report = live_step(
            facts,
            folder,
            plan=plan_of(facts.request["plan"]),
            store=self.store,
            threads=self.threads,
            should_stop=self.should_stop,
        )
        return kept_or_withdrawn(report, facts, self.registry)

    def approve(self, facts: CycleFacts, folder: Path) -> StepReport:
        """Wait for a person, if the plan wants one."""
        automatic = plan_of(facts.request["plan"]).approval == "auto"
        report = approve_step(facts, self.store, is_automatic=automatic)
        return kept_or_withdrawn(report, facts, self.registry)

    def promote(self, facts: CycleFacts, folder: Path) -> StepReport:
        """Move the registry's pointer."""
        return promote_step(facts, self.store, self.registry)

    def watch(self, facts: CycleFacts, folder: Path) -> StepReport:
        """Ask the gateway once it serves the candidate, and see what users get."""
        plan = plan_of(facts.request["plan"])
        return watch_step(facts, plan=plan, store=self.store, should_stop=self.should_stop)

    def roll_back(self, facts: CycleFacts, folder: Path) -> StepReport:
        """Move the registry's pointer back."""
        return roll_back_step(facts, self.store, self.registry)

    def earlier_rows(self, plan: LearnPlan, *, name: str, folder: Path) -> list[dict[str, Any]]:
        """Rows of the plan's files, and those that the model's promoted cycles accepted.

        Args:
            plan: with the files.
            name: of the model.
            folder: of all its cycles.
        """
        rows = read_batch(plan.replay) if plan.replay else []
        for cycle in self.store.cycles(name):
            if cycle.state == "promoted":
                kept = folder / f"cycle-{cycle.number:06}" / "validate" / _ACCEPTED
                rows += read_batch([str(kept)])
        return rows

    def asked_before(self, plan: LearnPlan, folder: Path) -> ModelAsked:
        """Outcomes that all cycles of the model share; `folder` is that of these cycles."""
        return self._asked(folder / "outcomes", plan)

    def folder_of(self, version: str) -> str:
        """Where a version's weights are.

        Raises:
            ModelError: they are not there.
        """
        found = self.store.model_version(version)
        if found is None or not Path(found.path).is_dir():
            where = "is not registered" if found is None else f"has no folder at {found.path}"
            name = "NAME" if found is None else found.name
            add = commands_for(self.store, name).add
            raise ModelError(f"version {version} {where}; add it again from its run ({add})")
        return found.path

    def require_whole(self, name: str, version: str, *, then: str) -> None:
        """Refuse to learn from a champion whose files are damaged; the registry raises an alert.

        Args:
            name: of the model.
            version: of its champion.
            then: what to do once another version serves.

        Raises:
            ModelError: they are, and which version can serve in its place.
        """
        check = self.registry.verify(version)
        if check.is_whole:
            return
        refused = f"champion {version} of {name!r} is not learned from: "
        try:
            instead = self.registry.servable(name).version
        except ModelError as error:  # nothing can serve
            raise ModelError(f"{refused}{error}, {then}") from None
        raise ModelError(
            f"{refused}{check.sentence}; version {instead} can serve in its place: "
            f"{self.registry.way_out(name)}, {then}"
        )

    def _earlier(self, facts: CycleFacts, plan: LearnPlan) -> list[dict[str, Any]]:
        return self.earlier_rows(plan, name=facts.name, folder=facts.folder.parent)

    def _champion(self, facts: CycleFacts) -> str:
        return self.folder_of(facts.champion)

    def _safety_counts(self, model: str, plan: LearnPlan) -> list[SafetyCount]:
        """What a model does on the safety sets that the plan limits."""
        if not plan.safety_limits:
            return []
        from gmpo.safety_runs import ask_safety_sets

        named = plan.recipe.model.model_copy(update={"name": model})
        reports = ask_safety_sets(
            plan.recipe.model_copy(update={"model": named}),
            tuple(plan.safety_limits),
            warn=self.warn,
        )
        return [report.count for report in reports]

    def _asked(self, folder: Path, plan: LearnPlan) -> ModelAsked:
        return ModelAsked(folder, plan.recipe, samples=plan.samples, warn=self.warn)


def _drop_run(step: Path, merged: Path) -> None:
    """Remove weights that are kept elsewhere by now, or needed no more."""
    drop_weights(
        step / "run", why="gmpo learn keeps weights only in the registry, once a step is over"
    )
    shutil.rmtree(merged, ignore_errors=True)


def _accepted(facts: CycleFacts) -> list[dict[str, Any]]:
    return read_batch([str(facts.files("validate") / _ACCEPTED)])


def _own_ids(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return mixed_rows(rows, [], replay_share=0.0, seed=0)


def _compared(
    champion: Mapping[str, SuiteOutcomes], candidate: Mapping[str, SuiteOutcomes]
) -> Compared:
    pairs = [(name, before, candidate[name]) for name, before in champion.items()]
    suites = [
        PairedSuite(
            suite=name,
            champion=success_shares(before),
            candidate=success_shares(after),
            samples=before.way.num_samples,
            items=tuple(item.digest for item in before.items),
        )
        for name, before, after in pairs
    ]
    length = Guardrail(
        name="length",
        champion=np.concatenate([completion_lengths(before) for _, before, _ in pairs]),
        candidate=np.concatenate([completion_lengths(after) for _, _, after in pairs]),
    )
    return Compared(suites=suites, guardrails=[length])
