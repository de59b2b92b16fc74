"""A round's rewarded rollouts on disk: a killed run goes on from these instead of sampling anew.

Weights are a function of the checkpoint and of the rollouts since. With these kept, a resumed run
repeats the lost steps exactly, even where sampling or a reward function would not repeat itself.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from gmpo.errors import CheckpointError, RunFolderError
from gmpo.records import Group, Prompt, Rollout
from gmpo.rewards import ScoredGroups

__all__ = ["SampledRound", "forget_rounds", "load_round", "save_round"]

_ARRAYS = ("token_ids", "from_policy", "sampler_logprobs")


@dataclass(frozen=True, kw_only=True)
class SampledRound:
    """What sampling and rewarding a round brought, and the seconds both took.

    Attributes:
        scored: every group that was sampled, in the order of the prompts.
        trained: places of the groups that the round trains on, rising.
        rollout_seconds: of sampling.
        reward_seconds: of the reward functions.
    """

    scored: ScoredGroups
    trained: tuple[int, ...]
    rollout_seconds: float
    reward_seconds: float

    @property
    def trained_groups(self) -> tuple[Group, ...]:
        """The groups that the round trains on."""
        return tuple(self.scored.groups[place] for place in self.trained)


def save_round(folder: Path, round_number: int, sampled: SampledRound, *, attempt: int = 0) -> Path:
    """Write `folder/round-NNNNNN.npz`, whole or not at all, and return it.

    Of a prompt only the id is kept: the task gives the rest again. A later attempt at the same
    round has a file of its own, `round-NNNNNN.attempt-K.npz`.

    Raises:
        RunFolderError: it cannot be written.
    """
    scored = sampled.scored
    rollouts = [rollout for group in scored.groups for rollout in group.rollouts]
    about = {
        "seconds": [sampled.rollout_seconds, sampled.reward_seconds],
        "trained": sampled.trained,
        "counts": {name: value for name, value in vars(scored).items() if name != "groups"},
        "groups": [
            {"prompt_id": group.prompt.id, "rollouts": [_about(r) for r in group.rollouts]}
            for group in scored.groups
        ],
    }
    path = _path(folder, round_number, attempt)
    partial = path.with_suffix(".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(
                file,
                about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
                token_ids=np.concatenate([r.token_ids for r in rollouts]),
                from_policy=np.concatenate([r.from_policy for r in rollouts]),
                sampler_logprobs=np.concatenate([r.sampler_logprobs for r in rollouts]),
            )
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunFolderError(
            f"{path} cannot be written: {error.strerror}; free space, then continue with --resume"
        ) from None
    return path


def load_round(
    folder: Path, round_number: int, prompts: Sequence[Prompt], *, attempt: int = 0
) -> SampledRound | None:
    """The saved round, bit for bit, or None if there is none.

    Args:
        folder: as given to `save_round`.
        round_number: counted from 1.
        prompts: of the round, in its order; those that it did not take may follow.
        attempt: as given to `save_round`.

    Raises:
        CheckpointError: the file is damaged, or of other prompts.
    """
    path = _path(folder, round_number, attempt)
    if not path.is_file():
        return None
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in (*_ARRAYS, "about")}
        about = json.loads(arrays.pop("about").tobytes())
        rows = _rows(arrays, [row["num_tokens"] for g in about["groups"] for row in g["rollouts"]])
        groups = tuple(
            _group(prompt, group, rows)
            for prompt, group in zip(prompts[: len(about["groups"])], about["groups"], strict=True)
        )
        trained = tuple(int(place) for place in about["trained"])
        rollout_seconds, reward_seconds = about["seconds"]
        scored = ScoredGroups(groups=groups, **about["counts"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"saved rollouts {path} are damaged or of another task ({error}); remove the file to "
            "sample the round again"
        ) from None
    return SampledRound(
        scored=scored,
        trained=trained,
        rollout_seconds=rollout_seconds,
        reward_seconds=reward_seconds,
    )


def forget_rounds(folder: Path, *, up_to: int) -> list[Path]:
    """Remove saved rounds that no kept checkpoint needs any more; returns what was removed.

    Those of every attempt at a round go together.
    """
    removed = [path for path in sorted(folder.glob("round-*.npz")) if _number(path) <= up_to]
    for path in removed:
        path.unlink()
    return removed


def _path(folder: Path, round_number: int, attempt: int) -> Path:
    of_attempt = f".attempt-{attempt}" if attempt else ""
    return folder / f"round-{round_number:06d}{of_attempt}.npz"


def _number(path: Path) -> int:
    return int(path.name.removeprefix("round-").partition(".")[0])


def _about(rollout: Rollout) -> dict[str, Any]:
    """A rollout's fields but its arrays; JSON keeps every float exactly."""
    names = [field.name for field in fields(rollout) if field.name not in _ARRAYS]
    about = {name: vars(rollout)[name] for name in names if name != "prompt_id"}
    return {
        **about,
        "rewards": dict(rollout.rewards),
        "notes": dict(rollout.notes),
        "num_tokens": rollout.num_tokens,
    }


def _rows(
    arrays: Mapping[str, np.ndarray], lengths: Sequence[int]
) -> Iterator[dict[str, np.ndarray]]:
    """Each rollout's arrays, cut from the whole ones."""
    stops = np.cumsum(lengths)
    for length, stop in zip(lengths, stops.tolist(), strict=True):
        yield {name: array[stop - length : stop] for name, array in arrays.items()}


def _group(
    prompt: Prompt, about: Mapping[str, Any], rows: Iterator[dict[str, np.ndarray]]
) -> Group:
    if prompt.id != about["prompt_id"]:
        raise ValueError(f"prompt {about['prompt_id']!r} stands where {prompt.id!r} was expected")
    rollouts = []
    for row in about["rollouts"]:
        everything: dict[str, Any] = {**row, **next(rows), "prompt_id": prompt.id}
        del everything["num_tokens"]
        rollouts.append(Rollout(**everything))
    return Group(prompt=prompt, rollouts=tuple(rollouts))
