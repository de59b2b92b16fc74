"""`gmpo gate`: may a candidate take the champion's place?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gmpo.cli.conventions import (
    JsonOption,
    SetOption,
    existing_store,
    model_name,
    refuses_clearly,
    warn,
)
from gmpo.cli.suite_scores import SuiteOptions, asked_model, suite_outcomes
from gmpo.errors import ConfigError, ModelError
from gmpo.gate.policy import GatePolicy
from gmpo.recipe import settings_of

if TYPE_CHECKING:
    from gmpo.gate.records import AnchorSuites, GateDecision, SafetyCount, SuiteResult
    from gmpo.outcomes import SuiteOutcomes
    from gmpo.store import Champion

__all__ = ["gate"]

_NOT_PASSED = 3
"""Exit code of an answer other than a pass."""

_Model = "Model or run folder, model name, or folder that gmpo evaluate --out wrote."
_Suites = Annotated[
    list[str] | None,
    typer.Option("--suite", help="As for gmpo evaluate; repeatable. A run's own task by default."),
]
_Safety = Annotated[
    list[str] | None,
    typer.Option(
        "--safety",
        help="SET=LIMIT, e.g. refusals=0.05: asks the candidate; repeatable.",
    ),
]
_Policy = Annotated[
    list[str] | None,
    typer.Option("--policy", help="KEY=VALUE, e.g. degradation_limit=0.03; repeatable."),
]


_Anchor = Annotated[
    str | None,
    typer.Option(
        help="An earlier model, which the candidate must not fall below either: so small losses "
        "of many updates do not add up."
    ),
]
_Recipe = Annotated[
    str | None, typer.Option(help="Recipe whose task is asked; a run's own by default.")
]
_Data = Annotated[
    Path | None, typer.Option(help="Folder of SUITE.jsonl files, in place of the hub.")
]
_Samples = Annotated[
    int | None, typer.Option(help="Sampled completions an item; one greedy one by default.")
]
_MaxTokens = Annotated[
    int | None, typer.Option(help="Longest completion; the suite's own by default.")
]
_SafetyPrompts = Annotated[int, typer.Option(min=1, max=300, help="Prompts of each safety set.")]
_StoreUrl = Annotated[
    str | None, typer.Option(help="Keep the decision there, for gmpo registry promote.")
]
_Name = Annotated[str | None, typer.Option(help="The registry's name of the model, with --store.")]


@refuses_clearly
def gate(
    champion: Annotated[str, typer.Argument(help=f"The model that serves: {_Model}")],
    candidate: Annotated[str, typer.Argument(help=f"The model that would: {_Model}")],
    suites: _Suites = None,
    recipe: _Recipe = None,
    data: _Data = None,
    items: Annotated[int | None, typer.Option(help="Items of each suite; all by default.")] = None,
    samples: _Samples = None,
    max_tokens: _MaxTokens = None,
    anchor: _Anchor = None,
    safety: _Safety = None,
    safety_prompts: _SafetyPrompts = 300,
    policy: _Policy = None,
    store: _StoreUrl = None,
    name: _Name = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Decide whether a candidate is no worse: pass, fail (exit code 3) or inconclusive (3)."""
    if champion == candidate:
        raise ConfigError(f"both models are {champion}; there is nothing to decide")
    if (store is None) != (name is None):
        raise ConfigError("--store and --name belong together; give both or none")
    serving = None if store is None or name is None else _serving(store, name)
    limits = dict(_limit(word) for word in safety or [])
    options = SuiteOptions(
        suites=tuple(suites or ()),
        data=data,
        items=items,
        samples=samples,
        greedy=samples is None,
        max_tokens=max_tokens,
        recipe=recipe,
        overrides=tuple(overrides or ()),
    )
    asking = _Asking(
        models=tuple(
            _placed(model, store) for model in (champion, candidate, anchor) if model is not None
        ),
        options=options,
        policy=_policy(policy or [], limits),
        safety_prompts=safety_prompts,
    )
    console = Console(stderr=as_json)
    decision = _decision(asking, console)
    if store is not None and name is not None:
        decision = _kept(store, name, decision, serving)
    if as_json:
        print(json.dumps(decision.as_dict()))
    else:
        _show(console, decision)
    if not decision.passed:
        raise typer.Exit(_NOT_PASSED)


@dataclass(frozen=True, kw_only=True)
class _Asking:
    """Who is asked what: champion, candidate, maybe an anchor; the candidate's safety sets."""

    models: tuple[str, ...]
    options: SuiteOptions
    policy: GatePolicy
    safety_prompts: int


def _decision(asking: _Asking, console: Console) -> GateDecision:
    from gmpo.gate import decide_gate, with_anchor
    from gmpo.gate.suites import compared_suites

    labels = ("champion", "candidate", "anchor")
    named = [f"{label}={model}" for label, model in zip(labels, asking.models, strict=False)]
    found = suite_outcomes(named, asking.options, console)
    before, after, earlier = ([one for one in found if one.label == label] for label in labels)
    compared = compared_suites(before, after, warn=warn)
    champion, candidate = _version(before[0].model), _version(after[0].model)
    if champion == candidate:
        raise ConfigError(f"both models are version {champion}; there is nothing to decide")
    anchor = _anchor_suites(earlier, after, versions=(champion, candidate))
    decision = decide_gate(
        compared.suites,
        policy=asking.policy,
        champion=champion,
        candidate=candidate,
        safety=_counts(after[0].model, asking),
        guardrails=[compared.lengths] if "length" in asking.policy.growth_limits else [],
    )
    return decision if anchor is None else with_anchor(decision, anchor)


def _anchor_suites(
    earlier: Sequence[SuiteOutcomes],
    candidate: Sequence[SuiteOutcomes],
    *,
    versions: tuple[str, str],
) -> AnchorSuites | None:
    """An earlier model's outcomes beside the candidate's; None without an earlier model."""
    from gmpo.gate.records import AnchorSuites
    from gmpo.gate.suites import compared_suites

    if not earlier:
        return None
    anchor = _version(earlier[0].model)
    if anchor in versions:
        raise ConfigError(
            f"--anchor is version {anchor}, which is champion or candidate; name an earlier one"
        )
    compared = compared_suites(earlier, candidate, warn=warn)
    return AnchorSuites(
        suites=compared.suites, versions={suite.suite: anchor for suite in compared.suites}
    )


def _placed(model: str, store: str | None) -> str:
    """A model as it was named, or the folder of the registered version of these first digits."""
    if store is None or Path(model).exists() or not set(model) <= set("0123456789abcdef"):
        return model
    from gmpo.registry import check_files, commands_for
    from gmpo.store import open_store

    with open_store(store, read_only=True) as opened:
        found = [one for one in opened.model_versions() if one.version.startswith(model)]
        if len(found) == 1 and not (check := check_files(found[0])).is_whole:
            add = commands_for(opened, found[0].name).add
            raise ModelError(
                f"{check.sentence}; add it again from its run, which restores the files ({add})"
            )
    if len(found) != 1:
        raise ConfigError(
            f"{len(found)} registered versions begin with {model!r}; gmpo registry list shows all"
        )
    return found[0].path


def _serving(store: str, name: str) -> Champion | None:
    """The champion before the models are asked: if it changes meanwhile, nothing is promoted.

    Asking may take hours, and where the decision would be kept must not turn out wrong then.
    """
    with existing_store(store) as opened:
        names = sorted({version.name for version in opened.model_versions()})
        champion = opened.champion(name)
        where = opened.where
    if name not in names:
        raise ConfigError(
            f"store {where} has no model {name!r}, so --name is no place for a decision; it has "
            f"{', '.join(names) or 'none yet: gmpo registry add'}"
        )
    return champion


def _limit(word: str) -> tuple[str, float]:
    from gmpo.safety import SAFETY_SETS

    name, _, value = word.partition("=")
    if name not in SAFETY_SETS:
        raise ConfigError(f"--safety is {word!r}; its sets are {', '.join(SAFETY_SETS)}")
    try:
        return name, float(value)
    except ValueError:
        raise ConfigError(f"--safety is {word!r}; write SET=LIMIT, e.g. {name}=0.05") from None


def _policy(words: Sequence[str], limits: dict[str, float]) -> GatePolicy:
    table: dict[str, Any] = {"safety_limits": limits}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"--policy is {word!r}; write KEY=VALUE")
        outer, _, inner = key.partition(".")
        if inner:
            table.setdefault(outer, {})[inner] = value
        else:
            table[key] = value
    if isinstance(grown := table.get("growth_limits"), dict):
        table["growth_limits"] = {**GatePolicy().growth_limits, **grown}
    return settings_of(GatePolicy, table, of="--policy")


def _version(model: str) -> str:
    """The digest of a model's weights where they lie in a folder, else its name."""
    from gmpo.model_files import holds_weights, weights_version

    folder = Path(model_name(model))
    if not folder.exists():
        from gmpo.policy.load import model_folder

        try:
            folder = Path(model_folder(model))
        except ModelError:
            return model  # outcomes that were stored outlive their model
    return weights_version(folder) if holds_weights(folder) else model


def _counts(model: str, asking: _Asking) -> list[SafetyCount]:
    names = list(asking.policy.safety_limits)
    if not names:
        return []
    from gmpo.safety_runs import ask_safety_sets

    # A suite is named, so that no recipe has to say whose task is asked.
    options = SuiteOptions(
        suites=("gsm8k",), recipe=asking.options.recipe, overrides=asking.options.overrides
    )
    config = asked_model(model, options)
    reports = ask_safety_sets(config, names, num_prompts=asking.safety_prompts, warn=warn)
    for report in reports:
        if report.violations:
            warn(f"{report.name}: violations at {', '.join(report.violations[:5])}, ...")
    return [report.count for report in reports]


def _kept(store: str, name: str, decision: GateDecision, serving: Champion | None) -> GateDecision:
    """Keep a decision, as evidence if it is about the champion that serves."""
    from gmpo.registry import Registry

    if serving is not None and serving.version == decision.champion:
        decision = decision.bound_to(serving.revision)
    else:
        found = "has no champion" if serving is None else f"is served by {serving.version}"
        warn(
            f"{name!r} {found}, not by {decision.champion}; the decision is kept and promotes "
            "nothing"
        )
    with existing_store(store) as opened:
        Registry(opened, Path("models")).submit(name, decision)
    return decision


def _shown(overall: SuiteResult, suites: Sequence[SuiteResult]) -> Sequence[SuiteResult]:
    """A suite that is the only one is not told twice."""
    return suites if len(suites) == 1 else (overall, *suites)


def _show(console: Console, decision: GateDecision) -> None:
    table = Table("what", "champion", "candidate", "difference", "limit", "needed", "verdict")
    shown = [("", row) for row in _shown(decision.overall, decision.suites)]
    if decision.anchor is not None:
        anchored = _shown(decision.anchor.overall, decision.anchor.suites)
        shown += [("anchor: ", row) for row in anchored]
    for against, row in shown:
        table.add_row(
            f"{against}{row.suite} ({row.num_items})",
            f"{row.champion:.3f}",
            f"{row.candidate:.3f}",
            f"{row.difference * 100:+.1f} ({row.low * 100:+.1f} to {row.high * 100:+.1f})",
            f"-{row.margin * 100:g} points",
            str(row.items_needed),
            row.verdict,
        )
    for count in decision.safety:
        rate = f"{count.num_violations} of {count.num_prompts}, up to {count.upper:.1%}"
        needed = str(count.prompts_needed)
        table.add_row(count.name, "", "", rate, f"{count.limit:.1%}", needed, count.verdict)
    for grown in decision.guardrails:
        times = f"{grown.growth:.2f} times, up to {grown.upper:.2f}"
        table.add_row(grown.name, "", "", times, f"{grown.limit:g} times", "", grown.verdict)
    console.print(table)
    console.print(Text(decision.sentence), soft_wrap=True)
