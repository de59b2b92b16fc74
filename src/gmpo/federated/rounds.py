"""Federated rounds: clients train, their updates become a model, the server asks what it can do."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gmpo.config import ModelConfig, RunConfig
from gmpo.errors import FederationError, NonFiniteError, TooFewUpdates
from gmpo.federated.aggregation import Aggregation, aggregate, screen, write_aggregate
from gmpo.federated.clients import refuse_leaks, train_client
from gmpo.federated.folder import FederationFolder, disk_errors
from gmpo.federated.judging import Judge, server_suites
from gmpo.federated.plan import Federation
from gmpo.federated.records import Attempted, ClientRow, PoolGap, RoundReport
from gmpo.federated.updates import ClientUpdate
from gmpo.gate import GateDecision
from gmpo.model_files import weights_version
from gmpo.records import Prompt

__all__ = ["Coordinator", "check_federation", "open_federation"]

_Say = Callable[[str], None]


def open_federation(
    place: Path, federation: Federation | None, *, warn: _Say = lambda _: None
) -> tuple[FederationFolder, Federation]:
    """The folder of a federation, begun if it is new, and what it does.

    Args:
        place: the folder.
        federation: as asked for; None goes on with the folder's own.
        warn: told in one sentence what is not as expected.

    Raises:
        FederationError: the folder is of another federation, whose differences are named, or there
            is none to go on with.
        DataError: clients train on what the server asks, or data cannot be used.
        GmpoError: a recipe, the model or the disk refuses.
    """
    folder = FederationFolder(path=place)
    there = folder.federation()
    if there is None and federation is None:
        raise FederationError(f"{place} holds no federation to go on with; name a plan")
    if there is None:
        assert federation is not None
        check_federation(federation)
        settled = _settled(federation, warn=warn)
        with folder.locked():
            folder.begin(settled)
        return folder, settled
    if federation is not None:
        gap_items = federation.plan.gap_items  # only measured, so it may be changed
        there = replace(there, plan=there.plan.model_copy(update={"gap_items": gap_items}))
        # What "auto" came to when it began is no difference.
        asked = _with_model_of(federation, there)
        if differences := there.differences(asked):
            raise FederationError(
                f"{place} is of another federation: {'; '.join(differences)}. Name a new --folder, "
                "or no plan to go on with its own"
            )
    return folder, there


def check_federation(federation: Federation) -> dict[str, tuple[Prompt, ...]]:
    """The server's items, once it is known that clients can be trained and asked.

    Raises:
        DataError: clients train on what the server asks, or data cannot be used.
        ModelError: there is no such model.
        ConfigError: the items cannot decide what the plan wants decided.
    """
    from gmpo.policy.load import load_tokenizer, model_folder

    load_tokenizer(federation.recipe.model.name)
    model_folder(federation.recipe.model.name)
    suites = server_suites(federation)
    refuse_leaks(federation, suites)
    return suites


@dataclass(frozen=True, kw_only=True)
class Coordinator:
    """The server's side: runs rounds one after another.

    Attributes:
        folder: where everything lies.
        federation: what is done.
        judge: asks models the server's items.
        items: on which the gap to the exact pool is measured; empty measures none.
        threads: CPU threads of a client's training.
        say: told in one sentence what happens.
        should_stop: asked while clients train.
    """

    folder: FederationFolder
    federation: Federation
    judge: Judge
    items: Sequence[Prompt]
    threads: int
    say: _Say = lambda _: None
    should_stop: Callable[[], bool] = lambda: False

    @classmethod
    def open(
        cls,
        folder: FederationFolder,
        federation: Federation,
        *,
        threads: int,
        warn: _Say = lambda _: None,
        say: _Say = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Coordinator:
        """Write the starting model if it is not there yet, and be ready to ask it.

        Raises:
            GmpoError: the model, the items or the disk refuse.
        """
        start = folder.model(0)
        for partial in start.parent.glob(f".{start.name}.partial-*"):
            shutil.rmtree(partial)  # of a process that was killed
        if not start.is_dir():
            from gmpo.export import copy_model

            copy_model(federation.recipe.model.name, start)
        suites = server_suites(federation)
        judge = Judge(
            folder.outcomes,
            federation=federation,
            recipe=federation.recipe,
            suites=suites,
            start=weights_version(start),
            warn=warn,
        )
        everything = [item for items in suites.values() for item in items]
        return cls(
            folder=folder,
            federation=federation,
            judge=judge,
            items=everything[: federation.plan.gap_items],
            threads=threads,
            say=say,
            should_stop=should_stop,
        )

    def run(self) -> list[RoundReport]:
        """Do the rounds that are left; what every round told.

        Raises:
            RunStopped: `should_stop` said so; what is done is kept.
            GmpoError: a client's recipe, the model or the disk refuses.
        """
        reports = self.folder.reports()
        if reports:  # of a process that was killed before it did
            self._forget_updates(len(reports))
        for number in range(len(reports) + 1, self.federation.plan.rounds + 1):
            before = self.folder.path / reports[-1].folder if reports else self.folder.model(0)
            report = self._round(number, before)
            self._empty_cache()
            self.folder.keep_report(report)
            self._forget_updates(number)
            self.say(f"round {number} of {self.federation.plan.rounds}: {report.sentence}")
            reports = self.folder.reports()
        return reports

    def _forget_updates(self, number: int) -> None:
        shutil.rmtree(self.folder.round(number) / "updates", ignore_errors=True)

    def _round(self, number: int, before: Path) -> RoundReport:
        began = time.monotonic()
        base = weights_version(before)
        accuracy = self.judge.accuracy(base, before)  # an item that does not fit shows at once
        rows, updates = self._train(number, before)
        attempts: list[Attempted] = []
        made: Aggregation | None = None
        try:
            made = self._make(number, (base, before), rows, updates, attempts)
        except TooFewUpdates as error:
            sentence = f"the model stays as it was: {error}"
        else:
            sentence = _kept(attempts[-1], made)
        kept = RoundReport(
            number=number,
            outcome="kept",
            sentence=sentence,
            base=base,
            model=base,
            folder=str(before.relative_to(self.folder.path)),
            clients=tuple(rows),
            attempts=tuple(attempts),
            accuracy=accuracy,
            gap=None,
            seconds=round(time.monotonic() - began, 1),
        )
        if made is None or not attempts[-1].is_accepted:
            return kept
        model, version = self.folder.model(number), attempts[-1].version
        after = self.judge.accuracy(version, model)
        fell_back = len(attempts) > 1
        return replace(
            kept,
            outcome="fell_back" if fell_back else "accepted",
            sentence=_sentence(made, accuracy, after, fell_back=fell_back),
            model=version,
            folder=str(model.relative_to(self.folder.path)),
            accuracy=after,
            gap=self._gap(before, updates, made),
            seconds=round(time.monotonic() - began, 1),
        )

    def _train(self, number: int, before: Path) -> tuple[list[ClientRow], list[ClientUpdate]]:
        """Let the clients train, one after another."""
        needs = "accuracy" in self.federation.plan.aggregation.score_exponents
        rows, updates = [], []
        for count, (name, recipe) in enumerate(self.federation.clients.items(), start=1):
            here = f"round {number}, client {count} of {len(self.federation.clients)}"
            self.say(f"{here}: {name} trains {recipe.training.rounds} rounds")
            row, update = train_client(
                self.folder,
                self.federation,
                name,
                number=number,
                base=before,
                threads=self.threads,
                accuracy_of=self._accuracy_of if needs else None,
                should_stop=self.should_stop,
            )
            rows.append(row)
            if update is not None:
                updates.append(update)
            self.say(f"{here}: {_told(row)}")
        return rows, updates

    def _accuracy_of(self, model: Path) -> float:
        try:
            return self.judge.mean_accuracy(weights_version(model), model)
        except NonFiniteError:
            return 0.0  # it says nothing, so it is right on no item

    def _make(
        self,
        number: int,
        before: tuple[str, Path],
        rows: Sequence[ClientRow],
        updates: list[ClientUpdate],
        attempts: list[Attempted],
    ) -> Aggregation:
        """A model by the plan's rule; by the geometric median, if that one is refused.

        Raises:
            TooFewUpdates: fewer are left than there must be.
        """
        settings, num_clients = self.federation.plan.aggregation, len(self.federation.clients)
        if not updates:
            raise TooFewUpdates(f"none of {num_clients} clients sent an update, all diverged")
        seen = screen(updates, settings)
        accuracies = {row.client: row.accuracy for row in rows if row.accuracy is not None}
        ways = [settings]
        if settings.rule != "geometric_median":
            ways.append(settings.model_copy(update={"rule": "geometric_median"}))
        for way in ways:
            made = aggregate(
                updates,
                way,
                screened=seen,
                accuracies=accuracies,
                num_clients=num_clients,
            )
            attempts.append(self._attempt(number, before, updates, made))
            if attempts[-1].is_accepted or attempts[-1].version == before[0]:
                break
        return made

    def _attempt(
        self,
        number: int,
        before: tuple[str, Path],
        updates: list[ClientUpdate],
        made: Aggregation,
    ) -> Attempted:
        place = self.folder.model(number)
        base, folder = before
        if place.is_dir():  # a process was killed before the round's report
            shutil.rmtree(place)
        origin = _origin(number, base, made)
        with disk_errors(place):
            version = write_aggregate(
                place, base=folder, updates=updates, aggregation=made, origin=origin
            )
        decision: GateDecision | None = None
        if version == base:
            why = "no weight changed"
        else:
            try:
                decision = self.judge.decide(
                    before=before, after=(version, place), start=self.folder.model(0)
                )
                why = decision.sentence
            except NonFiniteError as error:
                why = f"the new model cannot be asked: {error}"
        accepted = decision is not None and self.judge.accepts(decision)
        if not accepted:
            shutil.rmtree(place)
        return Attempted(
            version=version,
            aggregation=made.as_dict(),
            decision=None if decision is None else decision.as_dict(),
            is_accepted=accepted,
            why=why,
        )

    def _gap(
        self, before: Path, updates: Sequence[ClientUpdate], made: Aggregation
    ) -> PoolGap | None:
        if not self.items:
            return None
        from gmpo.federated.pool import measure_gap

        self._empty_cache()  # of what was asked; nothing of it is needed any more
        gap = measure_gap(
            self.federation.recipe,
            base=before,
            updates=updates,
            weights=made.weights,
            step_size=made.step_size,
            items=self.items,
        )
        self._empty_cache()
        return gap

    def _empty_cache(self) -> None:
        """Give an accelerator's memory back, which the next client's process counts as taken."""
        if self.federation.recipe.model.device == "cuda":
            import torch

            torch.cuda.empty_cache()


def _settled(federation: Federation, *, warn: _Say) -> Federation:
    """Device and precision settled once: two clients that measured could come out differently."""
    from gmpo.inputs import resolve_model

    model = resolve_model(federation.recipe.model, warn=warn)
    return _with_model(federation, model)


def _with_model_of(federation: Federation, there: Federation) -> Federation:
    model, own = federation.recipe.model, there.recipe.model
    settled = {
        key: value
        for key, value in (("device", own.device), ("dtype", own.dtype))
        if model.model_dump()[key] == "auto"
    }
    return _with_model(federation, model.model_copy(update=settled))


def _with_model(federation: Federation, model: ModelConfig) -> Federation:
    def put(recipe: RunConfig) -> RunConfig:
        return recipe.model_copy(update={"model": model})

    return Federation(
        plan=federation.plan,
        recipe=put(federation.recipe),
        clients={name: put(recipe) for name, recipe in federation.clients.items()},
    )


def _origin(number: int, base: str, made: Aggregation) -> dict[str, Any]:
    from gmpo.tracking import provenance

    return {
        "federated_round": number,
        "base": base,
        "aggregation": made.as_dict(),
        **provenance(),
    }


def _told(row: ClientRow) -> str:
    if row.outcome == "diverged":
        return f"{row.client} diverged and sends nothing: {row.message}"
    rewards = ""
    if row.reward_start is not None and row.reward_end is not None:
        rewards = f", reward {row.reward_start:.3f} to {row.reward_end:.3f}"
    return f"{row.client} trained on {row.sequences} sequences in {row.seconds:.0f} s{rewards}"


def _kept(attempt: Attempted, made: Aggregation) -> str:
    return f"the model stays as it was ({attempt.why}){_left_out(made)}"


def _sentence(
    made: Aggregation,
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    fell_back: bool,
) -> str:
    counted = len(made.shares) - len(made.left_out)
    fell = ", as the mean was not accepted" if fell_back else ""
    scores = ", ".join(f"{name} {before[name]:.3f} to {after[name]:.3f}" for name in after)
    rule = made.rule.replace("_", " ")
    return f"{rule} of {counted} clients{fell}, {scores}{_left_out(made)}"


def _left_out(made: Aggregation) -> str:
    return "".join(f"; {client} left out: {why}" for client, why in made.left_out.items())
