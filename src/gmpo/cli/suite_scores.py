"""Models on suites, side by side: `gmpo evaluate` with --suite, --out or several models."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from gmpo.cli.conventions import model_name, warn
from gmpo.errors import ConfigError, RunFolderError
from gmpo.outcomes import TASK_SUITE, Mix, SuiteOutcomes, Way, stored_outcomes, write_outcomes
from gmpo.recipe import apply_override, bundled_recipes, load_recipe, recipe_of_table
from gmpo.suites import SuiteItems, check_folder_is_read, known_suites, suite_items
from gmpo.suites.scores import ScoreTable, metrics_of, score_table

if TYPE_CHECKING:
    from gmpo.config import RunConfig

__all__ = [
    "NamedModel",
    "SuiteOptions",
    "asked_model",
    "evaluate_suites",
    "named_model",
    "suite_outcomes",
]

_SETTABLE = (
    "model.",
    "task.",
    "reward.timeout_seconds",
    "sampling.max_rows",
    "sampling.stop_strings",
    "sampling.rollout",
    "training.engine",
)
"""Keys that asking a suite heeds; of all others --set would do nothing."""


@dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """The options of the command; None or empty is not given."""

    suites: tuple[str, ...] = ()
    data: Path | None = None
    items: int | None = None
    samples: int | None = None
    temperature: float | None = None
    ks: tuple[int, ...] = ()
    best_of: int | None = None
    mix: str | None = None
    greedy: bool = True
    max_tokens: int | None = None
    instruction: str | None = None
    seed: int | None = None
    out: Path | None = None
    keep_texts: bool = False
    recipe: str | None = None
    overrides: tuple[str, ...] = ()

    def any_is_set(self) -> bool:
        """Whether an option is given that only evaluation by suites has."""
        shared = replace(self, items=None, recipe=None, overrides=())
        return shared != SuiteOptions()

    def asking_options(self) -> list[str]:
        """Options given that say how a model is asked."""
        given, plain = asdict(replace(self, suites=(), out=None, ks=())), asdict(SuiteOptions())
        names = {"greedy": "no-greedy", "overrides": "set"}
        return [
            f"--{names.get(name, name).replace('_', '-')}"
            for name, value in given.items()
            if value != plain[name]
        ]

    def ways(self) -> tuple[Way, ...]:
        """How items are asked.

        Raises:
            ConfigError: the options contradict each other or are out of range.
        """
        for name, value in (
            ("items", self.items),
            ("samples", self.samples),
            ("best-of", self.best_of),
            ("max-tokens", self.max_tokens),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"--{name} is {value}; it must be at least 1")
        samples = self.samples if self.best_of is None else self.samples or 1
        if samples is None:
            if not self.greedy:
                raise ConfigError("--no-greedy leaves nothing to ask; give --samples too")
            if self.temperature is not None or self.seed is not None:
                raise ConfigError(
                    "--temperature and --seed are of sampled completions; give --samples too"
                )
            if self.ks:
                raise ConfigError(
                    f"k = {self.ks[0]} needs sampled completions; give --samples {max(self.ks)}"
                )
            return (Way(name="greedy"),)
        temperature = 1.0 if self.temperature is None else self.temperature
        if not 0 < temperature < math.inf:
            raise ConfigError(
                f"--temperature is {temperature}; sampled completions need a finite one above 0, "
                "and the greedy one is asked besides"
            )
        for k in self.ks:
            if not 1 <= k <= samples:
                raise ConfigError(
                    f"k = {k} is not from 1 to the {samples} samples an item; lower it or "
                    "raise --samples"
                )
        sampled = Way(
            name="sampled",
            num_samples=samples,
            temperature=temperature,
            best_of=self.best_of or 1,
        )
        return (Way(name="greedy"), sampled) if self.greedy else (sampled,)


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """One argument: a model to ask, or outcomes that were stored."""

    label: str | None
    model: str
    stored: tuple[SuiteOutcomes, ...]


def named_model(argument: str) -> NamedModel:
    """LABEL=MODEL or MODEL, and the outcomes stored there, if any."""
    label, equals, model = argument.partition("=")
    if not equals or Path(argument).exists():
        label, model = "", argument
    if equals and not label and model != argument:
        raise ConfigError(f"{argument!r} has an empty label; write LABEL=MODEL or MODEL")
    folder = Path(model)
    is_run = (folder / "recipe.toml").is_file()
    stored = stored_outcomes(folder) if folder.is_dir() and not is_run else []
    if label and len({one.label for one in stored}) > 1:
        raise ConfigError(
            f"{model} holds outcomes of {sorted({one.label for one in stored})}, so it cannot be "
            f"called {label!r} alone; name one of its folders"
        )
    relabelled = tuple(replace(one, label=label) if label else one for one in stored)
    return NamedModel(label=label or None, model=model, stored=relabelled)


def evaluate_suites(arguments: Sequence[str], options: SuiteOptions, *, as_json: bool) -> None:
    """Ask or read back, then show tables; with --out, store all of it.

    Raises:
        gmpo.errors.GmpoError: an option, a suite, a model or stored outcomes are not usable.
    """
    console = Console(stderr=as_json)
    outcomes = suite_outcomes(arguments, options, console)
    tables = [score_table(outcomes, m) for m in metrics_of(outcomes, options.ks)]
    result = _as_dict(outcomes, tables)
    if options.out is not None:
        _store(options.out, result, tables)
    if as_json:
        print(json.dumps(result))
    else:
        _show(console, outcomes, tables, options.out)


def suite_outcomes(
    arguments: Sequence[str], options: SuiteOptions, console: Console
) -> list[SuiteOutcomes]:
    """Outcomes of models on suites, asked or read back; with --out each is stored.

    Raises:
        gmpo.errors.GmpoError: an option, a suite, a model or stored outcomes are not usable.
    """
    named = [named_model(argument) for argument in arguments]
    if all(one.stored for one in named):
        _refuse_asking(options)
        ways: tuple[Way, ...] = ()
    else:
        ways = options.ways()
    suites = known_suites([name for name in options.suites if name != TASK_SUITE])
    if options.data is not None:
        check_folder_is_read(suites, warn=warn)
    _mix(options)  # a mistyped name is told before a model is asked
    labels = _labels(named, options)
    # All of them before the first is asked, which may take hours: one may not be there.
    configs = [None if one.stored else asked_model(one.model, options) for one in named]
    _refuse_other_questions(
        [(label, config) for label, config in zip(labels, configs, strict=True) if config]
    )
    if options.out is not None:
        _prepare(options.out)
    folders = _folder_names(_all_labels(named, labels))
    outcomes: list[SuiteOutcomes] = []
    items = {}
    if any(not one.stored for one in named):
        items = {
            suite.name: suite_items(
                suite, folder=options.data, items=options.items, instruction=options.instruction
            )
            for suite in suites
        }
    for one, label, config in zip(named, labels, configs, strict=True):
        found = (
            _chosen(one, options.suites)
            if config is None
            else _asked(config, label, items, ways, options, console)
        )
        for outcome in found:
            outcomes.append(outcome)
            if options.out is not None:
                folder = options.out / folders[outcome.label]
                write_outcomes(folder, outcome, place=len(outcomes))
    return outcomes


def _mix(options: SuiteOptions) -> Mix | None:
    """The second model of all that are asked, and its weight."""
    from gmpo.policy.load import model_folder

    if options.mix is None:
        return None
    name, _, weight = options.mix.rpartition("=")
    try:
        share = float(weight)
    except ValueError:
        share = math.nan
    if not name or not 0 <= share <= 1:
        raise ConfigError(
            f"--mix is {options.mix!r}; write OTHER=WEIGHT, the weight from 0 to 1 being OTHER's "
            "in the geometric mean of each model and OTHER"
        )
    model_folder(name)
    return Mix(name=model_name(name), weight=share)


def _labels(named: Sequence[NamedModel], options: SuiteOptions) -> list[str]:
    """A label each, which tells of a mixture; of stored outcomes they have their own."""
    other, _, weight = (options.mix or "").rpartition("=")
    mixed = f" + {weight} {Path(other).name}" if other else ""
    labels = [one.label or f"{Path(one.model).name or one.model}{mixed}" for one in named]
    met = _all_labels(named, labels)
    twice = next((label for label in met if met.count(label) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"two models are called {twice!r}; give each a label of its own: LABEL=MODEL"
        )
    return labels


def _all_labels(named: Sequence[NamedModel], labels: Sequence[str]) -> list[str]:
    """Labels of all outcomes that will be there."""
    found: list[str] = []
    for one, label in zip(named, labels, strict=True):
        found += sorted({stored.label for stored in one.stored}) or [label]
    return found


def _refuse_other_questions(asked: Sequence[tuple[str, RunConfig]]) -> None:
    """Refuse what could not be compared, before hours are spent on it.

    What "auto" will take is not known yet: outcomes are held against each other once more.
    """
    systems = {label: config.model.system for label, config in asked}
    formats = {
        label: config.model.prompt_format
        for label, config in asked
        if config.model.prompt_format != "auto"
    }
    for key, values in (("model.system", systems), ("model.prompt_format", formats)):
        if len(set(values.values())) > 1:
            told = ", ".join(f"{value!r} for {label!r}" for label, value in values.items())
            raise ConfigError(
                f"the recipes put the same items differently: {key} is {told}; ask all alike, with "
                f"--set {key}=..."
            )


def _refuse_asking(options: SuiteOptions) -> None:
    given = options.asking_options()
    if given:
        raise ConfigError(
            f"all outcomes are read from files, so {', '.join(given)} would do nothing; leave "
            "that out, or name a model to ask"
        )


def _chosen(one: NamedModel, suites: Sequence[str]) -> list[SuiteOutcomes]:
    there = {outcome.suite for outcome in one.stored}
    for name in suites:
        if name not in there:
            raise ConfigError(
                f"{one.model} holds no outcomes of suite {name!r}, only of {sorted(there)}"
            )
    return [outcome for outcome in one.stored if not suites or outcome.suite in suites]


def _asked(
    config: RunConfig,
    label: str,
    items: dict[str, SuiteItems],
    ways: tuple[Way, ...],
    options: SuiteOptions,
    console: Console,
) -> Iterator[SuiteOutcomes]:
    from gmpo.suites.runs import Asking, ask_suites

    wanted = [
        _task_items(config, options) if name == TASK_SUITE else items[name]
        for name in options.suites or (TASK_SUITE,)
    ]
    if options.max_tokens is not None:
        wanted = [replace(suite, max_tokens=options.max_tokens) for suite in wanted]
    asking = Asking(
        ways=ways, seed=options.seed or 0, keep_texts=options.keep_texts, mix=_mix(options)
    )
    with console.status(f"loading {label}") as status:
        yield from ask_suites(
            config,
            wanted,
            asking,
            label=label,
            warn=warn,
            progress=lambda suite, way, done, of: status.update(
                Text(f"{label}: {suite} {way}, {done} of {of} items")
            ),
        )


def asked_model(model: str, options: SuiteOptions) -> RunConfig:
    """A recipe that says how the model is asked: the one named, the run's own, or the defaults.

    Raises:
        ConfigError: an override has no effect here, or nothing says whose task is asked.
        ModelError: there is no such model.
    """
    from gmpo.policy.load import model_folder

    for override in options.overrides:
        key = override.partition("=")[0].strip()
        if not key.startswith(_SETTABLE):
            raise ConfigError(
                f"--set {key} has no effect on suites; allowed are {', '.join(_SETTABLE)}, and the "
                "options of the command"
            )
    model_folder(model)  # a mistyped name needs no recipe
    own = Path(model) / "recipe.toml"
    if options.recipe is not None or own.is_file():
        config = load_recipe(options.recipe or own, options.overrides)
    elif TASK_SUITE in (options.suites or (TASK_SUITE,)):
        raise ConfigError(
            f"{model!r} is no run folder, so --recipe must say whose task is asked, or --suite "
            f"name a suite; bundled recipes: {', '.join(bundled_recipes())}"
        )
    else:
        table: dict[str, Any] = {"task": {"kind": "gsm8k"}}  # a recipe has one; it is not asked
        for override in options.overrides:
            apply_override(table, override)
        config = recipe_of_table(table, source="of the options")
    named = config.model.model_copy(update={"name": model_name(model)})
    return config.model_copy(update={"model": named})


def _task_items(config: RunConfig, options: SuiteOptions) -> SuiteItems:
    """The recipe's held-out items as a suite."""
    from gmpo.inputs import held_out_items, notes_of_evaluation
    from gmpo.task_table import build_task

    if options.instruction is not None and options.suites in ((), (TASK_SUITE,)):
        raise ConfigError("--instruction is of suites; a task has its own: --set task.instruction=")
    if options.items is not None:
        evaluation = config.evaluation.model_copy(update={"items": options.items})
        config = config.model_copy(update={"evaluation": evaluation})
    task = build_task(config.task)
    for note in (*task.notes(), *notes_of_evaluation(config, task)):
        warn(note)
    return SuiteItems(
        name=TASK_SUITE,
        title=task.name,
        prompts=held_out_items(config, task),
        max_tokens=config.evaluation.max_new_tokens or config.sampling.max_new_tokens,
    )


def _prepare(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(
            f"--out {out} is there already and not empty; name a new folder (outcomes of both can "
            f"be shown together: gmpo evaluate {out} NEW)"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"--out {out} cannot be made: {error.strerror}") from None


def _folder_names(labels: Sequence[str]) -> dict[str, str]:
    """A folder's name for each label, none twice, also where capitals make no difference."""
    plain = {label: _plain_name(label) for label in labels}
    # A label that is a name by itself has it, whichever came first.
    order = sorted(labels, key=lambda label: plain[label] != label)
    found: dict[str, str] = {}
    taken: set[str] = set()
    for label in order:
        name, number = plain[label], 1
        while name.casefold() in taken:
            number += 1
            name = f"{plain[label]}-{number}"
        taken.add(name.casefold())
        found[label] = name
    return found


def _plain_name(label: str) -> str:
    name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in label)
    return name if name.strip(".") else "-" * max(1, len(name))  # "." and ".." are other folders


def _store(out: Path, result: dict[str, Any], tables: Sequence[ScoreTable]) -> None:
    from gmpo.suites.plots import plot_scores

    path = out / "results.json"
    try:
        path.write_text(json.dumps(result, indent=1), encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{path} cannot be written: {error.strerror}") from None
    plot_scores(tables, out / "results.png")


def _as_dict(outcomes: Sequence[SuiteOutcomes], tables: Sequence[ScoreTable]) -> dict[str, Any]:
    made_with = [one.made_with for one in outcomes if one.made_with is not None]
    return {
        "made_with": [one for n, one in enumerate(made_with) if one not in made_with[:n]],
        "tables": [table.as_dict() for table in tables],
        "counts": [
            {
                "label": one.label,
                "model": one.model,
                "suite": one.suite,
                **asdict(one.way),
                "max_tokens": one.max_tokens,
                "asked_with": None if one.asked_with is None else asdict(one.asked_with),
                **one.counts(),
            }
            for one in outcomes
        ],
    }


def _show(
    console: Console,
    outcomes: Sequence[SuiteOutcomes],
    tables: Sequence[ScoreTable],
    out: Path | None,
) -> None:
    from gmpo.suites.tables import counts_table, gains_tables, scores_table

    for table in tables:
        console.print(scores_table(table))
        for gains in gains_tables(table):
            console.print(gains)
        for note in table.notes:
            warn(note)
    console.print(counts_table(outcomes))
    if out is not None:
        console.print(Text(f"stored: {out}"), soft_wrap=True)
