"""Versions of models, and the pointer to the one that serves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from gmpo.errors import (
    ChampionMoved,
    DataError,
    GmpoError,
    ModelError,
    PromotionRefused,
)
from gmpo.gate.records import GateDecision
from gmpo.registry.adding import keep, register
from gmpo.registry.advice import commands_for, way_out
from gmpo.registry.candidates import Candidate, newest_decision, waiting
from gmpo.registry.damage import end_damage, tell_damage
from gmpo.registry.evidence import WITHDRAWN, require_evidence, stale_reason
from gmpo.registry.files import FILES, FileCheck, FolderLock, ModelCopy, check_files, copied_model
from gmpo.registry.garbage import Garbage, clear_away
from gmpo.registry.line import ROLLBACK, nearest_whole, serving_line
from gmpo.store import Champion, Event, ModelVersion, Store

__all__ = ["Approval", "Mirror", "Registry"]

Approval = Literal["manual", "auto"]
"""Who moves the pointer after a gate that passed: a person, or the gate's own caller at once."""

Mirror = Callable[[Store, str], None]
"""Told the store and a model's name."""


class Registry:
    """Immutable versions in a folder, and who serves in the store.

    Any number of processes may use one folder and store. A version is there once its row is: files
    come first, under a temporary name, and the row last.

    Args:
        store: holds the rows.
        folder: of the versions, FOLDER/VERSION; the rows hold its absolute path.
        mirrors: called with the store and a model's name after each change of it.
        tell: told in one sentence what is not as expected.
    """

    def __init__(
        self,
        store: Store,
        folder: Path | str,
        *,
        mirrors: Sequence[Mirror] = (),
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._store = store
        self._folder = Path(folder).resolve()
        self._lock = FolderLock(self._folder)
        self._mirrors = tuple(mirrors)
        self._tell = tell
        self.num_mirror_failures = 0
        """Changes that a mirror was not told of; the next one, or `gmpo registry mirror`, tells it
        all."""

    def add(
        self,
        path: Path | str,
        *,
        name: str,
        parent: str | None = None,
        lineage: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> ModelVersion:
        """Copy a model into the registry; weights that are there already change nothing.

        Args:
            path: folder of a model, or of an adapter, in safetensors.
            name: of the model that this is a version of.
            parent: version that it was trained from.
            lineage: run, recipe, data: where it comes from.
            metrics: figures measured before.

        Returns:
            The version, as it was first registered.

        Raises:
            ModelError: the folder holds no model.
            DataError: these weights are a version of another model, or one whose files are damaged
                and lie in another folder or were others.
            RunFolderError: the disk is full, or the folder cannot be written.
        """
        with self._lock.shared(), copied_model(Path(path), self._folder) as copy:
            version = ModelVersion(
                version=copy.version,
                created=time.time(),
                name=name,
                path=str(self._folder / copy.version),
                parent=parent,
                lineage={**(lineage or {}), FILES: copy.files},
                metrics=dict(metrics or {}),
            )
            known = self._store.model_version(copy.version)
            if known is None:
                known = register(version, copy, store=self._store, lock=self._lock)
            if known is not None:
                return self._known(known, copy, name=name)
        self._mirrored(name)
        return version

    def adopt(self, name: str, version: str, *, reason: str) -> Champion:
        """Make a version the champion without evidence, where there is nothing to compare it with.

        That is so of a first champion, and where the champion's files are damaged like those of
        every version before it: what was lost is in the history then.

        Raises:
            ChampionMoved: the model has a champion that is whole; `promote` is how it is replaced.
            DataError: the version is not registered under this name.
            PromotionRefused: its files are damaged, or the champion's are and there is a whole
                version to go back to.
        """
        with self._lock.shared():
            self._require_whole(version)
            champion = self._store.champion(name)
            lost = [] if champion is None else self._lost(champion)
            champion = self._store.set_champion(
                name,
                expected=None if champion is None else champion.version,
                expected_revision=None if champion is None else champion.revision,
                version=version,
                reason={"kind": "adoption", "why": reason, **({"damaged": lost} if lost else {})},
                event_kind="promotion",
            )
        self._changed(champion)
        return champion

    def submit(
        self, name: str, decision: GateDecision, *, approval: Approval = "manual"
    ) -> Champion | None:
        """Keep a decision of the gate; one that passed makes its version a candidate.

        Args:
            name: of the model.
            decision: with all its evidence. One that does not say which champion it was measured
                against (`GateDecision.bound_to`) is kept, and is no evidence for a promotion.
            approval: "manual" waits for a person, who calls `promote`; "auto" promotes at once.

        Returns:
            The new champion if it was promoted.

        Raises:
            gmpo.errors.GmpoError: as for `promote`.
        """
        self._store.add_events(
            [
                Event(
                    kind="gate",
                    time=time.time(),
                    payload={"name": name, **decision.as_dict()},
                    model_version=decision.candidate,
                )
            ]
        )
        if approval == "manual" or not decision.passed:
            return None
        return self.promote(
            name,
            expected_champion=decision.champion,
            candidate=decision.candidate,
            evidence=decision,
        )

    def candidates(self, name: str) -> list[Candidate]:
        """Versions that passed against the champion that serves now, oldest first.

        Of several decisions about a version the newest counts. What was taken back is no candidate
        by the evidence that it once had.
        """
        return waiting(self._store, name)

    def withdraw(
        self, name: str, evidence: GateDecision | Mapping[str, Any], *, reason: str
    ) -> None:
        """Take back a decision that passed: its version has to pass again to be promoted.

        Args:
            name: of the model.
            evidence: the decision.
            reason: what was found since, in a sentence.
        """
        found = evidence.as_dict() if isinstance(evidence, GateDecision) else evidence
        about = {key: found.get(key) for key in ("champion", "candidate", "champion_revision")}
        payload = {"name": name, **about, "outcome": WITHDRAWN, "sentence": reason}
        version = str(about["candidate"])
        event = Event(kind="gate", time=time.time(), payload=payload, model_version=version)
        self._store.add_events([event])

    def newest_decision(self, name: str, candidate: str) -> dict[str, Any] | None:
        """What the gate last said about a version, whatever it said; None if it was not asked."""
        return newest_decision(self._store, name, candidate)

    def promote(
        self,
        name: str,
        *,
        expected_champion: str | None,
        candidate: str,
        evidence: GateDecision | Mapping[str, Any],
        by: str = "registry",
    ) -> Champion:
        """Make a candidate the champion, if the champion is still the one it was compared with.

        Args:
            name: of the model.
            expected_champion: version that the caller believes to serve.
            candidate: to serve from now on.
            evidence: the gate's decision about these two, measured against the champion that
                serves now: not before a rollback or another promotion.
            by: who decided, for the history.

        Raises:
            PromotionRefused: the evidence did not pass, was withdrawn or decided otherwise since,
                is about others or older than the champion, or the candidate's files are damaged.
            ChampionMoved: another version serves by now.
            DataError: the candidate is not registered under this name.
        """
        found = evidence.as_dict() if isinstance(evidence, GateDecision) else dict(evidence)
        told = json.loads(json.dumps(found))  # what is returned is what the store will give
        newest = newest_decision(
            self._store, name, candidate, revision=told.get("champion_revision")
        )
        revision = require_evidence(
            told, champion=expected_champion, candidate=candidate, newest=newest
        )
        with self._lock.shared():
            self._require_whole(candidate)
            history = self._store.champion_history(name, since_revision=revision)
            stale = stale_reason(history, revision=revision, candidate=candidate)
            if stale is not None and history[-1].version == expected_champion:
                raise PromotionRefused(stale)
            champion = self._store.set_champion(
                name,
                expected=expected_champion,
                expected_revision=revision,
                version=candidate,
                reason={"kind": "promotion", "by": by, "evidence": told},
                event_kind="promotion",
            )
        self._changed(champion)
        return champion

    def rollback(
        self, name: str, *, expected_champion: str | None, reason: str | Mapping[str, Any]
    ) -> Champion:
        """Make the predecessor serve again; if its files are damaged, the one before it.

        Args:
            name: of the model.
            expected_champion: version that is to be taken back.
            reason: why, for the history: a sentence, or a record with one under "why".

        Raises:
            ChampionMoved: another version serves.
            PromotionRefused: there is no predecessor whose files are whole.
        """
        with self._lock.shared():
            version, damaged = self._way_back(name, expected_champion)
            why = {"why": reason} if isinstance(reason, str) else dict(reason)
            champion = self._store.set_champion(
                name,
                expected=expected_champion,
                version=version,
                reason={**why, "kind": ROLLBACK, "damaged": damaged},
                event_kind=ROLLBACK,
            )
        self._changed(champion)
        return champion

    def rollback_target(self, name: str, *, expected_champion: str | None) -> ModelVersion:
        """The version that `rollback` would make serve now; nothing is changed.

        Raises:
            ChampionMoved: another version serves.
            PromotionRefused: there is no predecessor whose files are whole.
        """
        return self.version(self._way_back(name, expected_champion)[0])

    def history(self, name: str) -> list[Champion]:
        """Every champion that the model had, oldest first, with the reason of each."""
        return self._store.champion_history(name)

    def version(self, version: str) -> ModelVersion:
        """A version's row, with its path.

        Raises:
            DataError: there is no such version.
        """
        found = self._store.model_version(version)
        if found is None:
            raise DataError(
                f"model version {version} is not registered; gmpo registry list shows all"
            )
        return found

    def verify(self, version: str) -> FileCheck:
        """Whether a version's files are what was registered; all of them are read.

        Raises:
            DataError: there is no such version.
        """
        return check_files(self.version(version))

    def servable(self, name: str) -> ModelVersion:
        """The champion, or the nearest version before it where its files are damaged.

        Damage raises an alert in the store, which ends once the champion is whole again or another
        one. The pointer stays where it is: a person restores the files, or rolls back.

        Raises:
            DataError: the model has no champion.
            ModelError: no version of the line is whole.
        """
        line = serving_line(self._store.champion_history(name))
        if not line:
            adopt = commands_for(self._store, name).adopt
            raise DataError(f"model {name!r} has no champion; make a first version one ({adopt})")
        checks: list[FileCheck] = []
        for version in dict.fromkeys(reversed(line)):
            check = self.verify(version)
            if check.is_whole:
                if checks:
                    tell_damage(self._store, name, checks, instead=version)
                else:
                    end_damage(self._store, name, serving=version, summary="whole again")
                return self.version(version)
            checks.append(check)
        tell_damage(self._store, name, checks, instead=None)
        raise ModelError(
            f"no version of {name!r} can be served: {'; '.join(one.sentence for one in checks)}; "
            f"{way_out(commands_for(self._store, name), instead=None)}"
        )

    def way_out(self, name: str) -> str:
        """What to do about a damaged champion, with commands, for the end of a sentence."""
        line = serving_line(self._store.champion_history(name))
        found, _ = nearest_whole(line, is_whole=self._is_whole)
        return way_out(commands_for(self._store, name), instead=found)

    def collect_garbage(self, name: str, *, keep: int = 3, dry_run: bool = False) -> Garbage:
        """Remove files of versions that nothing needs; their rows stay.

        Kept are the champion, its predecessor, versions in running experiments and unfinished
        cycles, candidates, and the newest.

        Args:
            name: of the model.
            keep: so many of the newest stay in any case.
            dry_run: only say what would go.

        Raises:
            StoreLocked: the folder is in use.
            RunFolderError: a folder cannot be removed.
        """
        with self._lock.alone():
            candidates = [candidate.version for candidate in self.candidates(name)]
            return clear_away(
                self._store,
                self._folder,
                name,
                keep=keep,
                candidates=candidates,
                dry_run=dry_run,
            )

    def _way_back(self, name: str, expected_champion: str | None) -> tuple[str, list[str]]:
        """The nearest whole version before the champion, and the damaged ones between."""
        line = serving_line(self._store.champion_history(name))
        serving = line[-1] if line else None
        if serving != expected_champion:
            raise ChampionMoved(name, expected=expected_champion, found=serving)
        earlier = [one for one in line if one != serving]
        found, damaged = nearest_whole(earlier, is_whole=self._is_whole)
        if found is not None:
            return found, damaged
        which = f" whose files are whole (damaged: {', '.join(damaged)})" if damaged else ""
        commands = commands_for(self._store, name)
        advice = "promote another version"
        if serving is not None and not self._is_whole(serving):
            advice = way_out(commands, instead=None)
        elif damaged:
            advice += f", or add a damaged one again from its run ({commands.add})"
        raise PromotionRefused(f"{name!r} has no predecessor to go back to{which}; {advice}")

    def _lost(self, champion: Champion) -> list[str]:
        """The champion and all before it, where none of them is whole."""
        line = serving_line(self._store.champion_history(champion.name))
        whole, damaged = nearest_whole(line, is_whole=self._is_whole)
        if whole == champion.version:
            raise ChampionMoved(champion.name, expected=None, found=whole)
        if whole is not None:
            advice = way_out(commands_for(self._store, champion.name), instead=whole)
            raise PromotionRefused(
                f"champion {champion.version} is damaged and version {whole} before it is whole, "
                f"so nothing is adopted without evidence: {advice}"
            )
        return damaged

    def _is_whole(self, version: str) -> bool:
        return self.verify(version).is_whole

    def _require_whole(self, version: str) -> None:
        check = self.verify(version)
        if not check.is_whole:
            add = commands_for(self._store, self.version(version).name).add
            raise PromotionRefused(
                f"{check.sentence}; add it again from its run, which restores the files ({add})"
            )

    def _known(self, known: ModelVersion, copy: ModelCopy, *, name: str) -> ModelVersion:
        """A version that is there already, its files restored if they were damaged."""
        if known.name != name:
            raise DataError(
                f"these weights are version {known.version} of {known.name!r}, so they cannot be "
                f"one of {name!r}; train them on, or use the other name"
            )
        files = known.lineage.get(FILES)
        others = sorted(
            file
            for file in {**(files or {}), **copy.files}
            if files is not None and files.get(file) != copy.files.get(file)
        )
        check = check_files(known)
        if others and not check.is_whole:
            raise DataError(
                f"{check.sentence}, and is not restored: {', '.join(others)} of the new folder "
                "differ from what was registered; add the model with the files that it had"
            )
        if others:
            self._tell(
                f"version {known.version} stays as it was first registered; {', '.join(others)} "
                "of the new folder differ, and the weights are the same"
            )
        elif not check.is_whole:
            if Path(known.path).parent != self._folder:
                raise DataError(
                    f"{check.sentence}, which is not in the registry's folder {self._folder}, so "
                    f"it is not restored; give --folder {Path(known.path).parent}"
                )
            with self._lock.naming():
                keep(copy, self._folder)
            self._tell(f"the files of version {known.version} were damaged and are restored")
            champion = self._store.champion(name)
            if champion is not None and champion.version == known.version:
                end_damage(self._store, name, serving=known.version, summary="whole again")
        return known

    def _changed(self, champion: Champion) -> None:
        # Whoever becomes the champion was found whole just before.
        summary = f"version {champion.version} is the champion since"
        end_damage(self._store, champion.name, serving=champion.version, summary=summary)
        self._mirrored(champion.name)

    def _mirrored(self, name: str) -> None:
        for mirror in self._mirrors:
            try:
                mirror(self._store, name)
            except GmpoError as error:
                # What was changed stays changed: the store is the truth, the mirror a copy.
                self.num_mirror_failures += 1
                self._tell(f"a mirror was not told: {error}")
