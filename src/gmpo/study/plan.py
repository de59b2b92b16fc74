"""What a study runs: arms times seeds, every cell a recipe, fixed before the first run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gmpo.config import RunConfig
from gmpo.errors import ConfigError, RunFolderError, StudyError
from gmpo.recipe import apply_override, load_recipe, recipe_of_table, recipe_values
from gmpo.study.fairness import (
    CLIPS,
    FEWEST_STEPS,
    refuse_overrides,
    require_comparable,
    require_seeds,
    require_target,
)

__all__ = [
    "Arm",
    "Cell",
    "StudyPlan",
    "load_plan",
    "make_plan",
    "named_arms",
    "own_plan_as_asked",
    "parse_seeds",
    "plan_differences",
    "refuse_another_study",
    "refuse_used_folder",
    "resolve_plan",
]

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_MAY_DIFFER = (
    "objective.",
    "training.learning_rate",
    "training.gradient_clip_norm",
    "adaptive.clip",
    "adaptive.learning_rate",
)
"""Beginnings of keys that arms may differ in: anything else would unpair them."""


_MARKS = {
    "study.json": "a study of gmpo compare",
    "tuning.json": "a study of gmpo tune",
    "run.json": "a run of gmpo train",
}
"""What a folder is, by a file that only it has."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One side of a comparison: a label, and the recipe of its runs but for the seed."""

    label: str
    recipe: RunConfig


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a study."""

    arm: str
    seed: int
    recipe: RunConfig

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.arm}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """Arms times seeds.

    Attributes:
        source: recipe as it was named.
        arms: compared with the first of them.
        seeds: of data order and sampling, the same ones in every arm.
        target_reward: what "rounds to target" waits for; None takes `stability.common_target`.
        is_quick: made smaller by `--quick`.
        threads: CPU threads of each run; results are bit for bit alike at the same number only.
        num_seeds_before: how many seeds there were each time that more were added after runs had
            begun; empty where the seeds were all there before.
    """

    source: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    target_reward: float | None
    is_quick: bool
    threads: int
    num_seeds_before: tuple[int, ...] = ()

    @property
    def baseline(self) -> str:
        """Label of the arm that the others are compared with."""
        return self.arms[0].label

    @property
    def recipe(self) -> RunConfig:
        """What the arms have in common; its objective is the first arm's."""
        return self.arms[0].recipe

    def cells(self) -> Iterator[Cell]:
        """Every run, seed by seed, so that a study that ends early has whole pairs."""
        for seed in self.seeds:
            for arm in self.arms:
                training = arm.recipe.training.model_copy(update={"seed": seed})
                recipe = arm.recipe.model_copy(update={"training": training})
                yield Cell(arm=arm.label, seed=seed, recipe=recipe)

    def as_dict(self) -> dict[str, Any]:
        """For `study.json`; `from_dict` brings it back."""
        return {
            "source": self.source,
            "quick": self.is_quick,
            "seeds": list(self.seeds),
            "num_seeds_before": list(self.num_seeds_before),
            "target_reward": self.target_reward,
            "threads": self.threads,
            "arms": {
                arm.label: arm.recipe.model_dump(mode="json", exclude_none=True)
                for arm in self.arms
            },
        }

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], *, source: str) -> StudyPlan:
        """A plan as `as_dict` wrote it; `source` is for messages."""
        arms = [
            Arm(label=label, recipe=recipe_of_table(recipe, source=f"{source}, arm {label}"))
            for label, recipe in table["arms"].items()
        ]
        return cls(
            source=table["source"],
            arms=tuple(arms),
            seeds=tuple(table["seeds"]),
            target_reward=table["target_reward"],
            is_quick=table["quick"],
            threads=table["threads"],
            # Plans from before seeds could be added do not have it.
            num_seeds_before=tuple(table.get("num_seeds_before", ())),
        )


def make_plan(  # noqa: PLR0913 - all by keyword: they are the command's options
    source: str,
    *,
    objectives: Sequence[str],
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    arm_overrides: Sequence[str] = (),
    quick: bool = False,
    target_reward: float | None = None,
    threads: int = 1,
) -> StudyPlan:
    """The plan of a study.

    An arm's clips are the recipe's where the recipe has the arm's objective, else the objective's
    own defaults: half-widths of different objectives have different units.

    Args:
        source: bundled recipe or path.
        objectives: arms, each `OBJECTIVE` or `LABEL=OBJECTIVE`.
        seeds: at least two.
        overrides: `table.key=value`, of all arms.
        arm_overrides: `LABEL:table.key=value`, of one arm.
        quick: make the recipe small.
        target_reward: of "rounds to target".
        threads: of each run.

    Raises:
        ConfigError: what is asked is no fair comparison, or no recipe.
    """
    refuse_overrides(overrides)
    base = load_recipe(source, overrides)
    if quick:
        base = load_recipe(source, [*_quick_overrides(base), *overrides])
    require_comparable(base)
    require_seeds(seeds)
    require_target(target_reward)
    arms = _arms(base, objectives, _by_arm(arm_overrides, objectives))
    return StudyPlan(
        source=source,
        arms=arms,
        seeds=tuple(seeds),
        target_reward=target_reward,
        is_quick=quick,
        threads=threads,
    )


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds of "0,1,2".

    Raises:
        ConfigError: they are no whole numbers from 0 on.
    """
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        seeds = ()
    if not seeds or min(seeds) < 0:
        raise ConfigError(
            f"--seeds {text!r} must be whole numbers from 0 on between commas, e.g. 0,1,2"
        )
    return seeds


def load_plan(folder: Path) -> StudyPlan | None:
    """The plan that a study folder was made with; None if there is none.

    Raises:
        RunFolderError: its `study.json` is damaged.
        ConfigError: its recipes are not of this version.
    """
    path = folder / "study.json"
    if not path.is_file():
        return None
    try:
        return StudyPlan.from_dict(json.loads(path.read_text(encoding="utf-8")), source=str(path))
    except (OSError, json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        raise RunFolderError(
            f"{path} cannot be read ({type(error).__name__}: {error}); bring the file back, or "
            "choose another --study folder"
        ) from None


def own_plan_as_asked(
    study: Path,
    plan: StudyPlan,
    *,
    objectives: Sequence[str] | None,
    seeds: Sequence[int] | None,
) -> StudyPlan:
    """The plan of a study folder, as a call that names no recipe asks for it.

    Args:
        study: the folder, for messages.
        plan: of the folder.
        objectives: each `OBJECTIVE` or `LABEL=OBJECTIVE`; None, or those of the plan.
        seeds: None for those of the plan; whether others may be had says `plan_differences`.

    Raises:
        StudyError: the objectives are others.
        ConfigError: there is no study of such seeds.
    """
    if objectives is not None:
        there = named_arms(plan)
        if list(map(_label_and_objective, objectives)) != list(map(_label_and_objective, there)):
            difference = f"objectives: {there} there, {list(objectives)} here"
            refuse_another_study(study, [difference], command="compare")
    if seeds is None:
        return plan
    require_seeds(seeds)
    return replace(plan, seeds=tuple(seeds))


def named_arms(plan: StudyPlan) -> list[str]:
    """The plan's arms as `make_plan` takes them."""
    named = [(arm.label, arm.recipe.objective.name) for arm in plan.arms]
    return [label if label == name else f"{label}={name}" for label, name in named]


def refuse_used_folder(folder: Path, *, work: str, record: str) -> None:
    """Keep a new study out of a folder that is something else, whose files it would replace.

    Args:
        folder: that the study would begin in.
        work: name of the subfolder of its runs or trials.
        record: name of the file of its plan, which is not there.

    Raises:
        StudyError: there is a study, a run, or a study's work without its plan.
    """
    for name, what in _MARKS.items():
        if (folder / name).exists():
            raise StudyError(f"{folder} holds {what}; choose another --study folder")
    if (folder / work).exists():
        raise StudyError(
            f"{folder} holds {work} but no {record}; bring it back, or choose another --study"
        )


def refuse_another_study(folder: Path, differences: Sequence[str], *, command: str) -> None:
    """Keep a call out of a folder whose study is not the one that was asked for.

    Args:
        folder: of the study.
        differences: between its plan and the one asked for.
        command: of gmpo that goes on with it.

    Raises:
        StudyError: there are differences.
    """
    if differences:
        raise StudyError(
            f"study folder {folder} is of another study; {'; '.join(differences)}. Choose another "
            f"--study folder, or go on with its own plan: gmpo {command} --study {folder}"
        )


def resolve_plan(plan: StudyPlan, *, warn: Callable[[str], None]) -> StudyPlan:
    """The plan with device, precision and `training.kl_ref_every` settled once for all cells.

    `dtype = "auto"` measures for a moment: two cells that measured could come out differently.
    A recipe that does not name `training.kl_ref_every` measures on the last round, for the report.
    """
    from gmpo.inputs import resolve_model

    model = resolve_model(plan.recipe.model, warn=warn)
    arms = []
    for arm in plan.arms:
        training = arm.recipe.training
        if training.kl_ref_every is None:
            training = training.model_copy(update={"kl_ref_every": training.rounds})
        settled = arm.recipe.model_copy(update={"model": model, "training": training})
        arms.append(replace(arm, recipe=settled))
    return replace(plan, arms=tuple(arms))


def plan_differences(there: StudyPlan, asked: StudyPlan) -> list[str]:
    """In what a plan differs from that of a study folder, one sentence each.

    Device and precision "auto" mean what the folder has, and so does `training.kl_ref_every` where
    it is not named; the number of threads is the folder's. More seeds behind those of the folder
    are no difference: they can be added.
    """
    wholes: dict[str, tuple[object, object]] = {
        "objectives": ([arm.label for arm in there.arms], [arm.label for arm in asked.arms]),
        "target_reward": (there.target_reward, asked.target_reward),
    }
    found = [
        f"{name}: {_shown(was)} there, {_shown(now)} here"
        for name, (was, now) in wholes.items()
        if was != now
    ]
    if asked.seeds[: len(there.seeds)] != there.seeds:
        found.append(
            f"seeds: {list(there.seeds)} there, {list(asked.seeds)} here (more may be added behind "
            "those that are there, none left out)"
        )
    recipes = {arm.label: arm.recipe for arm in there.arms}
    for arm in asked.arms:
        if arm.label in recipes:
            found += _recipe_differences(arm, recipes[arm.label])
    return list(dict.fromkeys(found))


def _recipe_differences(asked: Arm, there: RunConfig) -> Iterator[str]:
    was, now = recipe_values(there.deciding()), recipe_values(asked.recipe.deciding())
    for key in ("model.device", "model.dtype"):
        now[key] = was[key] if now[key] == "auto" else now[key]
    if asked.recipe.training.kl_ref_every is None:
        now["training.kl_ref_every"] = was["training.kl_ref_every"]
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key):
            where = f"{asked.label}: " if key.startswith(_MAY_DIFFER) else ""
            yield f"{where}{key}: {_shown(was.get(key))} there, {_shown(now.get(key))} here"


def _shown(value: object) -> str:
    return "not set" if value is None else repr(value)


def _quick_overrides(base: RunConfig) -> list[str]:
    """What makes a recipe small; what it has smaller already stays."""
    rounds = min(base.training.rounds, 4)
    prompts = min(base.sampling.prompts_per_round, 8)
    steps = base.training.steps_per_round
    items = min(base.evaluation.items or 48, 48)
    return [
        f"training.rounds={rounds}",
        f"sampling.prompts_per_round={prompts}",
        f"training.steps_per_round={steps if prompts % steps == 0 else FEWEST_STEPS}",
        "training.warmup_steps=0",
        "training.gradient_cosine_every=0",
        f"training.kl_ref_every={rounds}",
        f"checkpoint.every_rounds={rounds}",
        f"evaluation.items={items}",
        "evaluation.every_rounds=0",
        "evaluation.few_shot=0",
        "evaluation.sampled=false",
    ]


def _by_arm(arm_overrides: Sequence[str], objectives: Sequence[str]) -> dict[str, list[str]]:
    """Overrides by the label of their arm."""
    labels = [_label_and_objective(text)[0] for text in objectives]
    found: dict[str, list[str]] = {label: [] for label in labels}
    for text in arm_overrides:
        label, colon, override = text.partition(":")
        key = override.partition("=")[0].strip()
        if not colon or label not in found:
            raise ConfigError(
                f"--set-for {text!r} must be LABEL:table.key=value, LABEL one of {labels}; e.g. "
                f"{labels[0]}:objective.clip_high=0.3"
            )
        if not key.startswith(_MAY_DIFFER) or key == "objective.name":
            raise ConfigError(
                f"--set-for {text!r}: arms may differ in objective.*, adaptive.clip*, "
                "adaptive.learning_rate*, training.learning_rate and training.gradient_clip_norm; "
                "anything else would unpair them: use --set for all"
            )
        found[label].append(override)
    return found


def _arms(
    base: RunConfig, objectives: Sequence[str], overrides: Mapping[str, Sequence[str]]
) -> tuple[Arm, ...]:
    named = [_label_and_objective(text) for text in objectives]
    if len(named) < 2 or len(overrides) < len(named):
        raise ConfigError(
            f"--objectives {','.join(objectives)!r} must name at least two arms, each once; one "
            "objective with two clips needs labels, e.g. grpo,wide=grpo"
        )
    arms = []
    for label, objective in named:
        table = base.model_dump(mode="json", exclude_none=True)
        if objective != base.objective.name:
            for clip in CLIPS:
                table["objective"].pop(clip, None)
            for bound in ("clip_min", "clip_max"):
                table["adaptive"].pop(bound, None)
        table["objective"]["name"] = objective
        for override in overrides[label]:
            apply_override(table, override)
        arms.append(Arm(label=label, recipe=recipe_of_table(table, source=f"of arm {label}")))
    return tuple(arms)


def _label_and_objective(text: str) -> tuple[str, str]:
    label, equals, objective = text.strip().partition("=")
    if not _LABEL.fullmatch(label):
        raise ConfigError(
            f"arm {text!r} must be OBJECTIVE or LABEL=OBJECTIVE, the label of letters, digits and "
            "._- because it names folders"
        )
    return label, objective if equals else label
