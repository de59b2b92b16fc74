"""Items of suites asked of a model version, once for each: outcomes are kept by version."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmpo.config import RunConfig
from gmpo.errors import ConfigError, RunFolderError
from gmpo.flushing import move_whole
from gmpo.outcomes import SuiteOutcomes, Way, prompt_digest, stored_outcomes, write_outcomes
from gmpo.records import Prompt
from gmpo.suites import SuiteItems

__all__ = [
    "ModelAsked",
    "completion_lengths",
    "require_apart",
    "some_items",
    "success_shares",
]


class ModelAsked:
    """Asks model versions the items of suites, and remembers what they said.

    Args:
        folder: outcomes are kept in FOLDER/VERSION.
        recipe: how models are asked: precision, system turn, stop strings, rows at once.
        samples: completions an item; 1 asks greedily.
        warn: told in one sentence what is not as expected.
    """

    def __init__(
        self, folder: Path, recipe: RunConfig, *, samples: int, warn: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._recipe = recipe
        self._way = (
            Way(name="greedy")
            if samples == 1
            else Way(name="sampled", num_samples=samples, temperature=1.0)
        )
        self._warn = warn

    def outcomes(
        self, version: str, model: Path, suites: Mapping[str, Sequence[Prompt]]
    ) -> dict[str, SuiteOutcomes]:
        """Outcomes of each suite, in the suites' order.

        Args:
            version: of the model, under which outcomes are kept.
            model: its folder.
            suites: items by name.

        Raises:
            gmpo.errors.GmpoError: the model cannot be loaded, or an item does not fit its context.
        """
        places = {name: self._place(version, name, items) for name, items in suites.items()}
        missing = {name: items for name, items in suites.items() if not places[name].is_dir()}
        if missing:
            self._ask(version, model, missing, places)
        return {name: stored_outcomes(place)[0] for name, place in places.items()}

    def stored(
        self, version: str, suites: Mapping[str, Sequence[Prompt]]
    ) -> dict[str, SuiteOutcomes]:
        """Outcomes of those suites that a version was asked before; nothing is asked.

        Args:
            version: of the model.
            suites: items by name.

        Raises:
            DataError: kept outcomes are damaged.
        """
        places = {name: self._place(version, name, items) for name, items in suites.items()}
        return {name: stored_outcomes(place)[0] for name, place in places.items() if place.is_dir()}

    def _ask(
        self,
        version: str,
        model: Path,
        suites: Mapping[str, Sequence[Prompt]],
        places: Mapping[str, Path],
    ) -> None:
        from gmpo.suites.runs import Asking, ask_suites

        limit = self._recipe.evaluation.max_new_tokens or self._recipe.sampling.max_new_tokens
        items = [
            SuiteItems(name=name, title=name, prompts=tuple(prompts), max_tokens=limit)
            for name, prompts in suites.items()
        ]
        named = self._recipe.model.model_copy(update={"name": str(model)})
        config = self._recipe.model_copy(update={"model": named})
        asking = Asking(ways=(self._way,))
        for outcomes in ask_suites(config, items, asking, label=version, warn=self._warn):
            place = places[outcomes.suite]
            partial = place.with_name(f"{place.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            write_outcomes(partial, outcomes, place=0)
            _keep(partial, place)

    def _place(self, version: str, name: str, items: Sequence[Prompt]) -> Path:
        """A folder that other items, or items asked another way, do not share."""
        model, sampling = self._recipe.model, self._recipe.sampling
        asked = {
            "items": [
                [prompt.id, [asdict(turn) for turn in prompt.messages or ()], prompt.text]
                for prompt in items
            ],
            "answers": [str(prompt.columns.get("answer")) for prompt in items],
            "way": asdict(self._way),
            "tokens": self._recipe.evaluation.max_new_tokens or sampling.max_new_tokens,
            "stops": sampling.stop_strings,
            "prompted": [model.prompt_format, model.system, model.dtype],
        }
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
        return self._folder / version / f"{name}-{digest}"


def _keep(partial: Path, place: Path) -> None:
    try:
        move_whole(partial, place)
    except OSError as error:
        raise RunFolderError(
            f"outcomes cannot be kept at {place}: {error.strerror}; free space, then give the same "
            "command again"
        ) from None


def require_apart(suites: Mapping[str, Sequence[Prompt]]) -> None:
    """Refuse an item that stands in two suites, where it would count twice.

    Raises:
        ConfigError: there is one; it is named.
    """
    first: dict[str, tuple[str, str]] = {}
    for name, items in suites.items():
        for item in items:
            other, there = first.setdefault(prompt_digest(item), (name, item.id))
            if other != name:
                raise ConfigError(
                    f"item {item.id!r} of suite {name!r} is item {there!r} of suite {other!r} too; "
                    "each counts once: take it out of one of them"
                )


def some_items(items: Sequence[Prompt], most: int, *, seed: str) -> tuple[Prompt, ...]:
    """At most so many of the items, drawn alike each time."""
    order = np.random.default_rng(list(seed.encode())).permutation(len(items))[:most]
    return tuple(items[int(place)] for place in sorted(order))


def success_shares(outcomes: SuiteOutcomes) -> NDArray[np.float64]:
    """Share of right completions of each item, `(items,)`, in [0, 1]."""
    return np.array([item.num_correct / len(item.completions) for item in outcomes.items])


def completion_lengths(outcomes: SuiteOutcomes) -> NDArray[np.float64]:
    """Mean tokens of each item's completions, `(items,)`."""
    return np.array([np.mean([c.num_tokens for c in item.completions]) for item in outcomes.items])
