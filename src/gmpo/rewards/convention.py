"""How a reward function is called: TRL's convention, by keyword, one entry a completion.

reward(prompts=, completions=, completion_ids=, trainer_state=, log_extra=, log_metric=,
       **columns) -> list[float | None]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from gmpo.errors import ConfigError, DataError
from gmpo.records import Prompt, Rollout

__all__ = [
    "RewardCall",
    "RewardFault",
    "RewardFunction",
    "RewardRows",
    "completion_text",
    "is_async",
    "missing_columns",
    "require_keywords",
    "rows_by_form",
]

_Turns = list[dict[str, str]]

_OWN_ARGUMENTS = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
)
"""What every function gets beside the columns, which therefore may not have these names."""


class RewardFunction(Protocol):
    """One value a completion, None where the function has nothing to say about it.

    It may be `async def`. It is called by keyword and has to take keywords that it does not name
    (`**kwargs`):

    * `prompts`: texts, or lists of `{"role", "content"}` where the task's prompts are chats;
    * `completions`: texts, or for chats `[{"role": "assistant", "content": text}]`;
    * `completion_ids`: the token ids of each completion, the stop token included;
    * `trainer_state`: a `transformers.TrainerState` with `global_step`, `max_steps` and `epoch`;
    * `log_extra(column, values)`: values, one a completion, kept beside each rollout;
    * `log_metric(name, value)`: a number for the round's metrics, averaged over its calls;
    * the prompts' columns by name, one value a completion, None where a prompt lacks it.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The rewards, in the order of the completions; for `async def`, awaited."""


@dataclass(frozen=True, kw_only=True)
class RewardFault:
    """What a reward function did wrong, for one row or for all rows of a call.

    A component of ours may return one in place of a value, to say why it has none.
    """

    what: str
    of_whole_call: bool = False
    cause: BaseException | None = None


@dataclass(frozen=True, kw_only=True)
class RewardRows:
    """Usable rollouts of one form, chat or plain text, with their prompts.

    `places` are their places among all usable rollouts of the round.
    """

    places: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    rollouts: tuple[Rollout, ...]
    column_names: tuple[str, ...]

    @property
    def is_chat(self) -> bool:
        """Whether these are chats."""
        return self.prompts[0].messages is not None

    def arguments(self) -> dict[str, Any]:
        """Fresh lists, so that a function that changes one spoils nothing for the next."""
        return {
            "prompts": [_prompt(prompt) for prompt in self.prompts],
            "completions": [self._completion(rollout) for rollout in self.rollouts],
            "completion_ids": [rollout.token_ids.tolist() for rollout in self.rollouts],
            **{name: [p.columns.get(name) for p in self.prompts] for name in self.column_names},
        }

    def _completion(self, rollout: Rollout) -> str | _Turns:
        if not self.is_chat:
            return rollout.text
        return [{"role": "assistant", "content": rollout.text}]


@dataclass(frozen=True, kw_only=True)
class RewardCall:
    """One call of one function, and what it logged on the way."""

    name: str
    function: RewardFunction
    rows: RewardRows
    trainer_state: object
    metrics: list[tuple[str, float]] = field(default_factory=list)
    notes: list[tuple[str, list[Any]]] = field(default_factory=list)

    def start(self) -> Any:
        """Call it: the values, or what has to be awaited for them."""
        return self.function(
            **self.rows.arguments(),
            trainer_state=self.trainer_state,
            log_extra=self._log_extra,
            log_metric=self._log_metric,
        )

    def _log_extra(self, column: str, values: Sequence[Any]) -> None:
        if len(values) != len(self.rows.places):
            raise ValueError(
                f"log_extra({column!r}) got {len(values)} values for {len(self.rows.places)} "
                "completions; give one a completion"
            )
        self.notes.append((str(column), list(values)))

    def _log_metric(self, name: str, value: float) -> None:
        self.metrics.append((str(name), float(value)))


def rows_by_form(usable: Sequence[tuple[Prompt, Rollout]]) -> list[RewardRows]:
    """The usable rollouts as the chats among them and the plain texts among them.

    A function sees one form a call, because functions tell the form by looking at one row.

    Raises:
        DataError: a column has the name of an argument that every function gets.
    """
    names = tuple(dict.fromkeys(name for prompt, _ in usable for name in prompt.columns))
    taken = [name for name in names if name in _OWN_ARGUMENTS]
    if taken:
        raise DataError(
            f"a prompt has a column {taken[0]!r}, which reward functions get for something "
            "else; rename it in the data set"
        )
    return list(_forms(usable, names))


def completion_text(completion: str | _Turns) -> str:
    """A completion's text, whichever form it came in."""
    if isinstance(completion, str):
        return completion
    return "\n\n".join(turn["content"] for turn in completion)


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it returns something to be awaited; `partial` and objects are looked into."""
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        type(function).__call__
    )


def require_keywords(name: str, function: Callable[..., Any]) -> None:
    """Refuse what cannot be called by the convention.

    Raises:
        ConfigError: it is no function, or takes no further keywords.
    """
    if not callable(function):
        raise ConfigError(f"reward {name!r} is {function!r}; it must be a function")
    parameters = _parameters(function)
    if parameters is None:
        return
    kinds = [parameter.kind for parameter in parameters.values()]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        raise ConfigError(
            f"reward {name!r} takes {list(parameters)} only, and it is also called with "
            f"{list(_OWN_ARGUMENTS)} and the prompts' columns; let it take **kwargs"
        )


def missing_columns(function: Callable[..., Any], columns: Sequence[str]) -> list[str]:
    """Arguments that the function cannot do without and will not get."""
    return [
        parameter.name
        for parameter in (_parameters(function) or {}).values()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        and parameter.name not in (*_OWN_ARGUMENTS, *columns)
    ]


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """Its parameters; None where Python does not know them, as of some built-in functions."""
    try:
        return inspect.signature(function).parameters
    except ValueError:
        return None


def _forms(
    usable: Sequence[tuple[Prompt, Rollout]], names: tuple[str, ...]
) -> Iterator[RewardRows]:
    for is_chat in (True, False):
        places = [
            place
            for place, (prompt, _) in enumerate(usable)
            if (prompt.messages is not None) == is_chat
        ]
        if places:
            yield RewardRows(
                places=tuple(places),
                prompts=tuple(usable[place][0] for place in places),
                rollouts=tuple(usable[place][1] for place in places),
                column_names=names,
            )


def _prompt(prompt: Prompt) -> str | _Turns:
    if prompt.messages is None:
        return prompt.text or ""
    return [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
