"""What a tuning study is: recipe, space, objective, and which items choose and which judge."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gmpo.config import RunConfig
from gmpo.errors import ConfigError, RunFolderError, StudyError
from gmpo.recipe import load_recipe, recipe_of_table, recipe_values
from gmpo.study.plan import refuse_another_study, refuse_used_folder
from gmpo.task_table import build_task
from gmpo.tracking import RunFolder, provenance
from gmpo.tuning.score import StabilityKind
from gmpo.tuning.space import (
    Parameter,
    Space,
    Value,
    default_space,
    own_values,
    read_space,
    recipe_with,
    space_from_dict,
    space_to_dict,
)

__all__ = ["DEFAULT_TRIALS", "TuningOptions", "TuningPlan", "make_tuning_plan", "open_tuning"]

DEFAULT_TRIALS = 50
_NUM_SEEDS = 5
_FEWEST_ITEMS = 2
_MOST_CANDIDATES = 10
_FILE = "tuning.json"


@dataclass(frozen=True, kw_only=True)
class TuningOptions:
    """How a study searches and judges, as asked for.

    Attributes:
        space: TOML file of parameters; None takes the default space.
        stability: which formula.
        is_pareto: search accuracy and stability as two objectives.
        prunes: stop trials early; None does so unless there are two objectives.
        seeds: of the last comparison; None takes five that no trial has.
        top: candidates of the last comparison.
        threads: CPU threads of each run.
    """

    space: Path | None = None
    stability: StabilityKind = "meaningful"
    is_pareto: bool = False
    prunes: bool | None = None
    seeds: tuple[int, ...] | None = None
    top: int = 3
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class TuningPlan:
    """A study, fixed before its first trial.

    Attributes:
        source: recipe as it was named.
        recipe: which is tuned, and which candidates have to beat.
        space: parameters searched.
        stability: which formula of it the objective has.
        is_pareto: accuracy and stability are two objectives, which nothing weighs in the search.
        prunes: whether trials that are behind at an evaluation end there.
        seeds: of the last comparison; trials have the recipe's.
        top: candidates of the last comparison.
        validation_items: held-out items that trials are scored on.
        test_items: those after them, which only the last comparison asks.
        threads: CPU threads of each run; results are bit for bit alike at the same number only.
    """

    source: str
    recipe: RunConfig
    space: Mapping[str, Parameter]
    stability: StabilityKind
    is_pareto: bool
    prunes: bool
    seeds: tuple[int, ...]
    top: int
    validation_items: int
    test_items: int
    threads: int

    @property
    def rounds_between(self) -> int:
        """Rounds between two looks at a trial; without pruning there are none."""
        own, rounds = self.recipe.evaluation.every_rounds, self.recipe.training.rounds
        return own if 0 < own < rounds else max(1, rounds // 4)

    def own_values(self) -> dict[str, Value] | None:
        """The recipe's own values of the parameters; None if one of them is not in the space."""
        own = own_values(self.recipe, self.space)
        found = {key: value for key, value in own.items() if value is not None}
        return None if list(self.strangers()) else found

    def strangers(self) -> Iterator[str]:
        """Parameters whose value in the recipe is outside the space, with that value."""
        for key, value in own_values(self.recipe, self.space).items():
            if value is None or not self.space[key].holds(value):
                yield f"{key} = {'not set' if value is None else value}"

    def trial_recipe(self, values: Mapping[str, Value]) -> RunConfig:
        """What a trial trains: scored greedily on the validation items alone."""
        own = self.recipe.evaluation
        return _evaluated(
            recipe_with(self.recipe, values),
            items=self.validation_items,
            items_during=min(own.items_during, self.validation_items),
            every_rounds=self.rounds_between if self.prunes else 0,
        )

    def judged_recipe(self, values: Mapping[str, Value]) -> RunConfig:
        """What the last comparison trains: measured on the items that no trial asked."""
        skipped = self.recipe.evaluation.skip_items + self.validation_items
        return _evaluated(
            recipe_with(self.recipe, values), skip_items=skipped, items=None, every_rounds=0
        )

    def as_dict(self) -> dict[str, Any]:
        """For `tuning.json`; `from_dict` brings it back."""
        return {
            "source": self.source,
            "recipe": self.recipe.model_dump(mode="json", exclude_none=True),
            "space": space_to_dict(self.space),
            "stability": self.stability,
            "pareto": self.is_pareto,
            "prunes": self.prunes,
            "seeds": list(self.seeds),
            "top": self.top,
            "validation_items": self.validation_items,
            "test_items": self.test_items,
            "threads": self.threads,
        }

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], *, source: str) -> TuningPlan:
        """A plan as `as_dict` wrote it; `source` is for messages."""
        return cls(
            source=table["source"],
            recipe=recipe_of_table(table["recipe"], source=source),
            space=space_from_dict(table["space"]),
            stability=table["stability"],
            is_pareto=table["pareto"],
            prunes=table["prunes"],
            seeds=tuple(table["seeds"]),
            top=table["top"],
            validation_items=table["validation_items"],
            test_items=table["test_items"],
            threads=table["threads"],
        )


def make_tuning_plan(
    source: str,
    options: TuningOptions,
    *,
    overrides: Sequence[str] = (),
    warn: Callable[[str], None] = lambda _: None,
) -> TuningPlan:
    """The plan of a study; the task is built, the model is not loaded.

    Half of the held-out items, or `evaluation.items` if that is fewer, score the trials. The rest
    is for the last comparison.

    Args:
        source: bundled recipe or path.
        options: how it searches and judges.
        overrides: `table.key=value`.
        warn: told in one sentence what is not as expected.

    Raises:
        ConfigError: what is asked for cannot be tuned, or is no recipe.
        DataError: the task is not usable.
    """
    recipe = load_recipe(source, overrides)
    if recipe.evaluation.measure != "accuracy":
        raise ConfigError(
            "evaluation.measure = 'reward': a study maximises 0.7 accuracy + 0.3 stability, and a "
            "mean reward has no such scale; set it to 'accuracy', which needs reference answers"
        )
    if options.is_pareto and options.prunes:
        raise ConfigError(
            "--prune with --pareto: of two objectives none says which trial is behind, and Optuna "
            "has no pruning there; leave out one of the two"
        )
    validation, test = _split(recipe, warn=warn)
    plan = TuningPlan(
        source=source,
        recipe=recipe,
        space=read_space(options.space, recipe) if options.space else default_space(recipe),
        stability=options.stability,
        is_pareto=options.is_pareto,
        prunes=not options.is_pareto if options.prunes is None else options.prunes,
        seeds=_seeds(recipe, options.seeds),
        top=_top(options.top),
        validation_items=validation,
        test_items=test,
        threads=options.threads,
    )
    for stranger in plan.strangers():
        warn(f"{stranger} in the recipe is outside the space, so it is no trial of the study")
    return plan


def open_tuning(
    folder: Path,
    plan: TuningPlan | None,
    *,
    trials: int | None,
    warn: Callable[[str], None],
) -> tuple[TuningPlan, int]:
    """The plan and number of trials of a study folder, which is begun if it is new.

    Args:
        folder: of the study.
        plan: as asked for; None goes on with the folder's own.
        trials: in all; None is the folder's number, 50 for a new one.
        warn: told in one sentence what is not as expected.

    Raises:
        StudyError: the folder is of another study, which differs in the keys named, or is a run;
            or there is neither a plan nor a study.
        RunFolderError: the folder cannot be read or written.
    """
    there = _load(folder)
    if there is None and plan is None:
        raise StudyError(f"{folder} holds no tuning study to go on with; name a recipe")
    if there is None:
        assert plan is not None
        refuse_used_folder(folder, work="trials", record=_FILE)
        from gmpo.inputs import resolve_model

        model = resolve_model(plan.recipe.model, warn=warn)
        resolved = replace(plan, recipe=plan.recipe.model_copy(update={"model": model}))
        count = DEFAULT_TRIALS if trials is None else trials
        _write(folder, resolved, count, provenance())
        return resolved, count
    found, count, made_with = there
    differences = [] if plan is None else list(_differences(found, plan))
    refuse_another_study(folder, differences, command="tune")
    if trials is not None and trials != count:
        _write(folder, found, trials, made_with)
        count = trials
    return found, count


def _load(folder: Path) -> tuple[TuningPlan, int, Mapping[str, Any]] | None:
    path = folder / _FILE
    if not path.is_file():
        return None
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        plan = TuningPlan.from_dict(table, source=str(path))
        return plan, int(table["trials"]), table["made_with"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise RunFolderError(
            f"{path} cannot be read ({type(error).__name__}: {error}); bring the file back, or "
            "choose another --study folder"
        ) from None


def _write(folder: Path, plan: TuningPlan, trials: int, made_with: Mapping[str, Any]) -> None:
    record = {**plan.as_dict(), "trials": trials, "made_with": made_with}
    RunFolder(folder, option="--study").write_text(_FILE, json.dumps(record, indent=1) + "\n")


def _split(recipe: RunConfig, *, warn: Callable[[str], None]) -> tuple[int, int]:
    """Items that choose, and items that judge."""
    skipped = recipe.evaluation.skip_items
    there = len(build_task(recipe.task).held_out) - skipped
    asked, half = recipe.evaluation.items, there // 2
    validation = half if asked is None else min(asked, half)
    if validation < _FEWEST_ITEMS:
        after = f" after the {skipped} that are skipped" if skipped else ""
        raise ConfigError(
            f"the task holds out {there} items{after}, and evaluation.items is {asked or 'not set'}"
            f": a study needs at least {_FEWEST_ITEMS} to choose by and as many to judge by; raise "
            "task.held_out_items or evaluation.items"
        )
    if asked is not None and asked > half:
        warn(
            f"evaluation.items is {asked}: trials are scored on {half} items, half of those held "
            "out, so that the other half can judge"
        )
    return validation, there - validation


def _seeds(recipe: RunConfig, seeds: tuple[int, ...] | None) -> tuple[int, ...]:
    own = recipe.training.seed
    if seeds is None:
        return tuple(range(own + 1, own + 1 + _NUM_SEEDS))
    if own in seeds:
        raise ConfigError(
            f"--seeds names {own}, the seed of all trials, which the search has seen; name others"
        )
    if len(set(seeds)) < len(seeds) or len(seeds) < 2:
        raise ConfigError(
            f"--seeds {','.join(map(str, seeds))} must name at least two, each once: with one "
            "nobody can tell a better recipe from a lucky run"
        )
    return seeds


def _top(top: int) -> int:
    if not 1 <= top <= _MOST_CANDIDATES:
        raise ConfigError(
            f"--top {top} must be 1 to {_MOST_CANDIDATES}: each candidate more widens the "
            "intervals of all"
        )
    return top


def _evaluated(recipe: RunConfig, **changes: int | None) -> RunConfig:
    evaluation = recipe.evaluation.model_copy(update={"few_shot": 0, "sampled": False} | changes)
    return recipe.model_copy(update={"evaluation": evaluation})


def _differences(there: TuningPlan, asked: TuningPlan) -> Iterator[str]:
    """One sentence each; device and precision "auto" mean what the folder has."""
    was, now = recipe_values(there.recipe.deciding()), recipe_values(asked.recipe.deciding())
    for key in ("model.device", "model.dtype"):
        now[key] = was[key] if now[key] == "auto" else now[key]
    yield from _changes(was, now)
    yield from _changes(_shown(there.space), _shown(asked.space), prefix="space: ")
    skip = ("source", "recipe", "space", "threads")
    plans = [{k: v for k, v in p.as_dict().items() if k not in skip} for p in (there, asked)]
    yield from _changes(*plans)


def _shown(space: Space) -> dict[str, str]:
    return {key: str(parameter) for key, parameter in space.items()}


def _changes(was: Mapping[str, Any], now: Mapping[str, Any], *, prefix: str = "") -> Iterator[str]:
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key):
            pair = ("not set" if v is None else repr(v) for v in (was.get(key), now.get(key)))
            yield f"{prefix}{key}: {' there, '.join(pair)} here"
