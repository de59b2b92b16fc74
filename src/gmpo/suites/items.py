"""Evaluation suites: which there are, where their items are found, how they are put."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gmpo.errors import ConfigError, DataError
from gmpo.records import Prompt
from gmpo.tasks import RowForm, Task, bundled_task, dataset_task, jsonl_task

__all__ = [
    "DATA_FOLDER_VARIABLE",
    "SUITES",
    "HubSource",
    "Suite",
    "SuiteItems",
    "check_folder_is_read",
    "known_suites",
    "suite_items",
]

DATA_FOLDER_VARIABLE = "GMPO_MATH_DATA"
"""Environment variable that names the folder of suites where no option does."""

_BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
_PAPER_TOKENS = 3000  # arXiv 2507.20673 evaluates with completions of up to 3,000 tokens
_WORD_PROBLEM_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """Where the hub has a suite, and which of its columns are the problem and the answer."""

    name: str
    split: str
    config_name: str | None = None
    form: RowForm


@dataclass(frozen=True, kw_only=True)
class Suite:
    """An evaluation set of the field.

    Attributes:
        name: as on the command line, and of its file NAME.jsonl.
        title: as in the paper's tables.
        max_tokens: longest completion, unless another is asked for.
        hub: where it is downloaded from; None for those that come with the package.
    """

    name: str
    title: str
    max_tokens: int = _PAPER_TOKENS
    hub: HubSource | None = None


@dataclass(frozen=True, kw_only=True)
class SuiteItems:
    """Items to be asked: of a suite, or of a task that is evaluated like one."""

    name: str
    title: str
    prompts: tuple[Prompt, ...]
    max_tokens: int


def _hub(
    name: str,
    *,
    split: str = "test",
    config_name: str | None = None,
    prompt_column: str = "problem",
    answer_column: str = "answer",
) -> HubSource:
    # No other column is kept: some hold pictures, some a second answer.
    form = RowForm(prompt_column=prompt_column, answer_column=answer_column, keep_columns=())
    return HubSource(name=name, split=split, config_name=config_name, form=form)


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(name="aime24", title="AIME24", hub=_hub("HuggingFaceH4/aime_2024", split="train")),
        Suite(name="amc", title="AMC", hub=_hub("AI-MO/aimo-validation-amc", split="train")),
        Suite(name="math500", title="MATH500", hub=_hub("HuggingFaceH4/MATH-500")),
        Suite(
            name="minerva",
            title="Minerva",
            hub=_hub("math-ai/minervamath", prompt_column="question"),
        ),
        Suite(
            name="olympiadbench",
            title="OlympiadBench",
            hub=_hub(
                "Hothan/OlympiadBench",
                config_name="OE_TO_maths_en_COMP",
                split="train",
                prompt_column="question",
                answer_column="final_answer",
            ),
        ),
        Suite(name="gsm8k", title="GSM8K", max_tokens=_WORD_PROBLEM_TOKENS),
        Suite(name="svamp", title="SVAMP", max_tokens=_WORD_PROBLEM_TOKENS),
    )
}
"""The five of the paper's Table 1 in its order, then the word problems that are bundled."""


def known_suites(names: Sequence[str]) -> list[Suite]:
    """The suites of these names, in this order.

    Raises:
        ConfigError: there is no such suite (the nearest name is offered), or one is named twice.
    """
    for name in names:
        if name not in SUITES:
            near = difflib.get_close_matches(name.lower(), SUITES, n=1)
            hint = f"did you mean {near[0]!r}? There are" if near else "there are"
            raise ConfigError(
                f"there is no suite {name!r}; {hint} {', '.join(SUITES)}, and for gmpo evaluate "
                "'task', the recipe's own held-out items"
            )
        if names.count(name) > 1:
            raise ConfigError(f"suite {name!r} is named twice; name each once")
    return [SUITES[name] for name in names]


def check_folder_is_read(suites: Sequence[Suite], *, warn: Callable[[str], None]) -> None:
    """Say which suites a folder named with --data does not replace.

    Args:
        suites: those asked for.
        warn: told of those that come with the package, beside others that the folder has.

    Raises:
        ConfigError: no suite asked for is read from a folder, so it would do nothing.
    """
    bundled = [suite.name for suite in suites if suite.hub is None]
    if len(bundled) == len(suites):
        others = ", ".join(name for name, suite in SUITES.items() if suite.hub)
        raise ConfigError(
            f"--data would do nothing for {' and '.join(bundled) or 'a task'}; leave it out, or "
            f"ask for a suite that does not come with the package: {others}"
        )
    if bundled:
        warn(f"--data does not replace what comes with the package: {' and '.join(bundled)}")


def suite_items(
    suite: Suite,
    *,
    folder: Path | None = None,
    items: int | None = None,
    instruction: str | None = None,
) -> SuiteItems:
    """The items of a suite, each with the instruction after it.

    GSM8K is its own test file. SVAMP is the 300 problems that the bundled task holds out, which
    no recipe of this package trains on. The others are not part of the package: they are read
    from NAME.jsonl (or .jsonl.gz) in a folder, or from the hub where no folder is named.

    Args:
        suite: one of `SUITES`.
        folder: of the files; None is what `GMPO_MATH_DATA` names, if it is set.
        items: how many, in an order of no meaning that is the same for every model; None is all.
        instruction: after each problem; None asks for steps and a boxed answer.

    Raises:
        DataError: the suite is not in the folder or cannot be had from the hub (what to download
            and where to put it is said), or has fewer items than asked for.
    """
    asked = _BOXED if instruction is None else instruction
    prompts = _prompts(suite, folder=folder, instruction=asked)
    if items is not None and items > len(prompts):
        raise DataError(
            f"{items} items were asked for, and suite {suite.name} has {len(prompts)}; lower "
            "--items or leave it out for all"
        )
    order = np.random.default_rng(0).permutation(len(prompts))[:items]
    return SuiteItems(
        name=suite.name,
        title=suite.title,
        prompts=tuple(prompts[int(place)] for place in order),
        max_tokens=suite.max_tokens,
    )


def _prompts(suite: Suite, *, folder: Path | None, instruction: str) -> tuple[Prompt, ...]:
    if suite.hub is None:
        return bundled_task(name=suite.name, instruction=instruction).held_out
    named = os.environ.get(DATA_FOLDER_VARIABLE)
    folder = Path(named) if folder is None and named else folder
    if folder is not None:
        return jsonl_task(path=_file(suite, folder), instruction=instruction).train
    return _from_hub(suite, suite.hub, instruction).train


def _file(suite: Suite, folder: Path) -> Path:
    for name in (f"{suite.name}.jsonl", f"{suite.name}.jsonl.gz"):
        if (folder / name).is_file():
            return folder / name
    state = "does not exist" if not folder.is_dir() else f"holds no {suite.name}.jsonl"
    raise DataError(f"folder {folder} {state}; {_how_to_get(suite)}")


def _from_hub(suite: Suite, hub: HubSource, instruction: str) -> Task:
    try:
        return dataset_task(
            name=hub.name,
            config_name=hub.config_name,
            split=hub.split,
            form=hub.form,
            instruction=instruction,
        )
    except DataError as error:
        raise DataError(
            f"suite {suite.name} cannot be had from the hub ({error}); {_how_to_get(suite)}"
        ) from None


def _how_to_get(suite: Suite) -> str:
    assert suite.hub is not None
    config = f", configuration {suite.hub.config_name}" if suite.hub.config_name else ""
    return (
        f"download {suite.hub.name} (split {suite.hub.split}{config}), write it as "
        f"{suite.name}.jsonl with rows "
        '{"id": ..., "problem": ..., "answer": ...}, and name its folder with --data or '
        f"{DATA_FOLDER_VARIABLE}"
    )
