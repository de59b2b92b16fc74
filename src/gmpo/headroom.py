"""Whether a run fits into the memory that is free, and what to lower where it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gmpo.config import RunConfig
from gmpo.errors import ConfigError
from gmpo.forecast import Forecast, forecaster
from gmpo.host_memory import available_bytes
from gmpo.inputs import RunInputs
from gmpo.memory import GIB

__all__ = ["free_bytes", "refusal_beyond_memory", "require_memory"]


@dataclass(frozen=True, kw_only=True)
class _Lever:
    """A number of the recipe that takes less memory where it is lower.

    Attributes:
        name: its key.
        values: that it may have, up to the recipe's own.
        at: the recipe with another value.
    """

    name: str
    values: range
    at: Callable[[RunConfig, int], RunConfig]


def require_memory(inputs: RunInputs, needs: Forecast, *, free: int | None) -> None:
    """Refuse a run that cannot fit, and say what to lower to which value.

    Args:
        inputs: of the run.
        needs: its forecast.
        free: bytes that this process may still take; None where that is not known.

    Raises:
        ConfigError: it needs more than there is, and the recipe does not say to go on anyway.
    """
    reason = refusal_beyond_memory(inputs, needs, free=free)
    if reason is not None:
        raise ConfigError(reason)


def refusal_beyond_memory(inputs: RunInputs, needs: Forecast, *, free: int | None) -> str | None:
    """Why `require_memory` refuses a run, in one sentence; None where it does not."""
    wanted = needs.wanted_gib
    if not inputs.config.training.refuse_beyond_memory or free is None or wanted * GIB <= free:
        return None
    return (
        f"the run needs about {wanted:.2f} GiB of memory and {free / GIB:.2f} GiB are free "
        f"({_sum(needs)}); {_remedy(inputs, free)}, or set training.refuse_beyond_memory = false "
        "to try anyway"
    )


def free_bytes(device: torch.device) -> int | None:
    """What this process may still take where the model will lie; None if that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_bytes()


def _sum(needs: Forecast) -> str:
    """The parts that add up to what is wanted."""
    loaded = f" without {needs.loaded_gib:.2f} in memory already" if needs.loaded_gib else ""
    update, sampling = needs.update_gib, needs.sampling_gib
    moments = (
        f"a micro-batch {update:.2f}, while sampling takes {sampling:.2f}"
        if update > sampling
        else f"sampling {sampling:.2f}, while a micro-batch takes {update:.2f}"
    )
    weights = needs.weights_gib - needs.loaded_gib
    helpers = f"; the other processes {needs.helpers_gib:.2f}" if needs.helpers_gib else ""
    return (
        f"weights, gradients and moments {weights:.2f}{loaded}, sampler's cache "
        f"{needs.cache_gib:.2f}, a round's rollouts {needs.rollouts_gib:.2f}, and for a moment "
        f"{moments}{helpers}"
    )


def _remedy(inputs: RunInputs, free: int) -> str:
    """The largest values of a few keys with which the run would fit.

    First those of the keys that cost nothing but time, and only where they do not help the number
    of rollouts, which decides what is learned.
    """
    forecast_of = forecaster(inputs)

    def needed(config: RunConfig) -> float:
        return forecast_of(config).wanted_gib * GIB

    of_time, of_rollouts = _levers_of_time(inputs.config), _levers_of_rollouts(inputs.config)
    for levers in (
        *((lever,) for lever in _levers_of_processes(inputs.config)),
        *((lever,) for lever in reversed(of_time)),
        of_time,
        *((lever,) for lever in of_rollouts),
        (*of_rollouts, *of_time),
    ):
        found = _lowered(inputs.config, levers, lambda changed: needed(changed) <= free)
        if found:
            first, *others = reversed(found)
            return f"{first}{' with ' if others else ''}{' and '.join(others)} would fit"
    config = inputs.config
    for lever in (*of_rollouts, *of_time):
        config = lever.at(config, lever.values[0])
    others = [
        *(() if config.lora.rank else ("lora.rank = 16",)),
        *(
            ()
            if config.training.gradient_checkpointing
            else ("training.gradient_checkpointing = true",)
        ),
    ]
    lighter = f"{' and '.join(others)} {'take' if others[1:] else 'takes'} less, else "
    return (
        f"with one row at a time it would still need {needed(config) / GIB:.2f} GiB; "
        f"{lighter if others else ''}take a smaller model or a machine with more memory"
    )


def _levers_of_processes(config: RunConfig) -> list[_Lever]:
    """None for a run of one process, and none where each has a device of its own."""

    def with_processes(config: RunConfig, value: int) -> RunConfig:
        training = config.training.model_copy(update={"processes": value})
        return config.model_copy(update={"training": training})

    count = config.training.processes
    if count == 1 or config.model.device != "cpu":
        return []
    return [_Lever(name="training.processes", values=range(1, count + 1), at=with_processes)]


def _levers_of_time(config: RunConfig) -> tuple[_Lever, _Lever]:
    def with_rows(config: RunConfig, value: int) -> RunConfig:
        return _with_sampling(config, max_rows=value)

    def with_budget(config: RunConfig, value: int) -> RunConfig:
        training = config.training.model_copy(update={"max_tokens_per_micro_batch": value})
        return config.model_copy(update={"training": training})

    rows, budget = config.sampling.max_rows, config.training.max_tokens_per_micro_batch
    return (
        _Lever(name="sampling.max_rows", values=range(1, rows + 1), at=with_rows),
        _Lever(
            name="training.max_tokens_per_micro_batch",
            values=range(1, budget + 1),
            at=with_budget,
        ),
    )


def _levers_of_rollouts(config: RunConfig) -> list[_Lever]:
    """The larger number first: it is the likelier slip."""

    def with_group(config: RunConfig, value: int) -> RunConfig:
        return _with_sampling(config, group_size=value)

    def with_prompts(config: RunConfig, value: int) -> RunConfig:
        return _with_sampling(config, prompts_per_round=value)

    group, prompts = config.sampling.group_size, config.sampling.prompts_per_round
    steps = config.training.steps_per_round
    levers = [
        _Lever(name="sampling.group_size", values=range(2, group + 1), at=with_group),
        _Lever(
            name="sampling.prompts_per_round",
            values=range(steps, prompts + 1, steps),
            at=with_prompts,
        ),
    ]
    return sorted(levers, key=lambda lever: -lever.values[-1])


def _with_sampling(config: RunConfig, **changes: int) -> RunConfig:
    sampling = config.sampling.model_copy(update=changes)
    return config.model_copy(update={"sampling": sampling})


def _lowered(
    config: RunConfig, levers: Sequence[_Lever], fits: Callable[[RunConfig], bool]
) -> list[str]:
    """The levers' largest values that fit, each in its turn, the later ones at their least.

    Returns:
        as `key = value`, those that are lower than in the recipe; none if the least do not fit.
    """
    for lever in levers:
        config = lever.at(config, lever.values[0])
    if not fits(config):
        return []
    found = []
    for lever in levers:
        value = _largest(lever, config, fits)
        config = lever.at(config, value)
        if value != lever.values[-1]:
            found.append(f"{lever.name} = {value}")
    return found


def _largest(lever: _Lever, config: RunConfig, fits: Callable[[RunConfig], bool]) -> int:
    """The largest value that fits, by halving; the least does."""
    low, high = 0, len(lever.values) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if fits(lever.at(config, lever.values[middle])):
            low = middle
        else:
            high = middle - 1
    return lever.values[low]
