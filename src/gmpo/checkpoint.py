"""Checkpoints at round boundaries: written whole or not at all, verified when read."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gmpo.errors import CheckpointError, DamagedCheckpointError, RunFolderError
from gmpo.flushing import flush_folder, flush_names
from gmpo.policy.adapter_files import ADAPTER_WEIGHTS, load_adapter_weights, save_adapter
from gmpo.policy.score import Policy

__all__ = [
    "TrainingState",
    "begin_attempt",
    "beginning_of_attempt",
    "checkpoint_model",
    "checkpoint_round",
    "checkpoints_newest_first",
    "latest_checkpoint",
    "load_checkpoint",
    "load_newest_checkpoint",
    "remove_newer_checkpoints",
    "remove_old_checkpoints",
    "save_checkpoint",
    "save_tokenizer",
    "verified_content",
]

_PREFIX = "round-"
_WEIGHTS = "model/model.safetensors"
_ADAPTER = f"adapter/{ADAPTER_WEIGHTS}"
_MOMENTS = "optimizer.safetensors"
_REMEDY = "; remove the folder to go on from what was before it"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Where a run stands after a round; with weights and moments, all it needs to go on.

    Attributes:
        round: rounds done.
        step: optimizer steps done, which is also the policy version.
        prompts_taken: prompts sampled so far, which is where the next round's begin.
        mismatch_is_small: whether the last round allowed sampler log-probabilities; None at first.
        recipe_digest: of the resolved recipe; another recipe's checkpoint is refused.
        version: of gmpo.
        guard: what the guard remembers, as JSON holds it; empty before the first judged round.
        norms: what `guard.skip_steps` remembers of gradients, likewise.
        attempt: how often the guard has rolled the run back.
        adapted: settings of the next round and what their controllers remember, as JSON holds them;
            empty where all settings are constant, and before the first round.
    """

    round: int
    step: int
    prompts_taken: int
    mismatch_is_small: bool | None
    recipe_digest: str
    version: str
    guard: Mapping[str, Any] = field(default_factory=dict)
    norms: Mapping[str, Any] = field(default_factory=dict)
    attempt: int = 0
    adapted: Mapping[str, Any] = field(default_factory=dict)


def save_checkpoint(
    folder: Path,
    *,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerBase,
    state: TrainingState,
    base: Policy | None = None,
) -> Path:
    """Write `folder/round-NNNNNN` and return it.

    `model/` in it loads with transformers; a policy with adapters leaves `adapter/` in its place,
    which loads with PEFT. Everything goes to a temporary name first, is flushed to disk, and is
    then renamed.

    Args:
        folder: of the checkpoints.
        policy: whose weights are saved.
        optimizer: whose moments are.
        tokenizer: of the policy.
        state: where the run stands.
        base: whose frozen weights the run needs besides: the policy itself if it has adapters, or
            else its reference. Not they are saved but their digest. None: it needs no others.

    Raises:
        RunFolderError: the disk is full or not writable; older checkpoints are untouched.
    """
    final = folder / f"{_PREFIX}{state.round:06d}"
    partial = folder / f".{final.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        weights = partial / (_ADAPTER if policy.adapters else _WEIGHTS)
        weights.parent.mkdir(parents=True)
        if policy.adapters:
            save_adapter(policy, weights.parent)
        else:
            _save_model(policy, weights)
        save_tokenizer(tokenizer, weights.parent)
        save_file(_moments(policy, optimizer), partial / _MOMENTS)
        files = (weights, partial / _MOMENTS)
        content = {
            **asdict(state),
            "digests": {str(file.relative_to(partial)): _digest(file) for file in files},
        }
        if base is not None:
            content["base_digest"] = base.base_digest
        (partial / "state.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        flush_folder(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        flush_names(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunFolderError(
            f"checkpoint {final} could not be written: {error}; free space and continue with "
            "--resume: what was saved before is untouched"
        ) from None
    return final


def load_checkpoint(
    path: Path,
    *,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    recipe_digest: str,
    base: Policy | None = None,
) -> TrainingState:
    """Put a checkpoint's weights and moments back; returns where the run stood.

    Args:
        path: of the checkpoint.
        policy: takes the weights.
        optimizer: takes the moments.
        recipe_digest: of the recipe that it must have been made with.
        base: as for `save_checkpoint`; its weights must be those of then.

    Raises:
        DamagedCheckpointError: files are missing, or are not what was written.
        CheckpointError: it belongs to another recipe, or to another base model.
        ModelError: it belongs to another model.
    """
    content = verified_content(path)
    base_digest = content.pop("base_digest", None)
    state = TrainingState(**content)
    if state.recipe_digest != recipe_digest:
        raise CheckpointError(
            f"checkpoint {path} was made with another recipe; resume with the run's own "
            "recipe.toml, or choose another run folder"
        )
    if base is not None and base_digest != base.base_digest:
        raise CheckpointError(_why_another_base(path, base, is_told=base_digest is not None))
    if policy.adapters:
        load_adapter_weights(policy, path / "adapter")
    else:
        policy.load_weights(load_file(path / _WEIGHTS).items())
    _restore_moments(load_file(path / _MOMENTS), policy, optimizer)
    return state


def _why_another_base(path: Path, base: Policy, *, is_told: bool) -> str:
    name = repr(base.model.name_or_path)
    remedy = "bring back the model it was trained on, or choose another run folder"
    if not is_told:
        return (
            f"checkpoint {path} does not say what its run's starting model was, which KL is "
            f"measured to, so that {name} may be another by now; it is of an older version of "
            "gmpo: train anew in another run folder, without KL to the start, or with that version"
        )
    what = "holds adapters of" if base.adapters else "measures KL to"
    return f"checkpoint {path} {what} another base model than {name} is now; {remedy}"


def verified_content(path: Path) -> dict[str, Any]:
    """What `state.json` says besides digests, once the files are found to be what was written.

    Raises:
        DamagedCheckpointError: files are missing, or are not what was written.
    """
    try:
        content: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        digests: Mapping[str, str] = content.pop("digests")
        expected = {each.name for each in fields(TrainingState)}
        if content.keys() - {"base_digest"} != expected:
            raise ValueError(f"it has {sorted(content)} instead of {sorted(expected)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(
            f"checkpoint {path} has no readable state.json: {error}{_REMEDY}"
        ) from None
    for name, digest in digests.items():
        if not (path / name).is_file() or _digest(path / name) != digest:
            raise DamagedCheckpointError(
                f"checkpoint {path} is damaged: {name} is not what was written{_REMEDY}"
            )
    return content


def load_newest_checkpoint(
    folder: Path,
    *,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    recipe_digest: str,
    warn: Callable[[str], None],
    base: Policy | None = None,
) -> TrainingState | None:
    """Put the newest undamaged checkpoint back; None if there is no checkpoint at all.

    A damaged one is named to `warn` and, once an older one is found to be whole, moved aside to
    `damaged-round-NNNNNN`, so that it is neither used nor counted again.

    Raises:
        DamagedCheckpointError: all are damaged; it names the oldest.
        CheckpointError: it belongs to another recipe or another base model.
        ModelError: it belongs to another model.
    """
    damaged: list[Path] = []
    # One without a state.json too: a checkpoint gets its name when it is whole.
    found = _folders(folder)[::-1]
    for path in found:
        try:
            state = load_checkpoint(
                path,
                policy=policy,
                optimizer=optimizer,
                recipe_digest=recipe_digest,
                base=base,
            )
        except DamagedCheckpointError as error:
            what = str(error).removesuffix(_REMEDY)
            if path == found[-1]:
                raise DamagedCheckpointError(
                    f"{what}; no whole checkpoint is left in {folder}: bring one back, or train "
                    "anew in another run folder"
                ) from None
            warn(f"{what}; the one before it is tried")
            damaged.append(path)
            continue
        for each in damaged:
            each.rename(_free_name(folder / f"damaged-{each.name}"))
        return state
    return None


def _free_name(path: Path) -> Path:
    """The path, or with -2, -3 and so on behind it: the same round may be damaged once more."""
    names = chain([path], (path.with_name(f"{path.name}-{number}") for number in count(2)))
    return next(name for name in names if not name.exists())


def checkpoints_newest_first(folder: Path) -> list[Path]:
    """Checkpoints under `folder` that were written to their end."""
    return [path for path in _folders(folder)[::-1] if (path / "state.json").is_file()]


def checkpoint_model(path: Path) -> Path:
    """The folder of a checkpoint that `load_model` takes: a whole model, or adapters."""
    adapter = path / "adapter"
    return adapter if adapter.is_dir() else path / "model"


def checkpoint_round(path: Path) -> int:
    """Rounds done when a checkpoint was written, by its name."""
    return int(path.name.removeprefix(_PREFIX))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint under `folder`, or None."""
    return next(iter(checkpoints_newest_first(folder)), None)


def begin_attempt(path: Path, *, attempt: int) -> None:
    """Have a checkpoint be the beginning of this attempt; everything else in it stays.

    Its `state.json` is replaced at once, so that a process killed here leaves the old or the new.

    Raises:
        DamagedCheckpointError: it has no readable `state.json`.
        RunFolderError: it cannot be written; the checkpoint is as it was.
    """
    file, partial = path / "state.json", path / ".state.json.partial"
    try:
        content = {**json.loads(file.read_text(encoding="utf-8")), "attempt": attempt}
    except (OSError, ValueError, TypeError) as error:
        raise DamagedCheckpointError(
            f"checkpoint {path} has no readable state.json: {error}{_REMEDY}"
        ) from None
    try:
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
        flush_folder(path)
        partial.replace(file)
        flush_names(path)
    except OSError as error:
        raise RunFolderError(
            f"{file} cannot be written: {error.strerror}; free space, then continue with --resume"
        ) from None


def remove_newer_checkpoints(folder: Path, *, than: int) -> list[Path]:
    """Remove the checkpoints after round `than`, oldest first; returns what was removed.

    Each loses its name before its files, so that a process killed here leaves no half checkpoint.
    """
    newer = [path for path in _folders(folder) if checkpoint_round(path) > than]
    for path in newer:
        nameless = folder / f".{path.name}.partial"
        shutil.rmtree(nameless, ignore_errors=True)
        path.rename(nameless)
        shutil.rmtree(nameless)
    return newer


def beginning_of_attempt(folder: Path) -> int | None:
    """Round of the oldest checkpoint of the newest one's attempt; None without any.

    One that cannot be read counts to no attempt; it is named if the run goes back to it.
    """
    attempts = [(path, _attempt(path)) for path in checkpoints_newest_first(folder)]
    known = [(path, attempt) for path, attempt in attempts if attempt is not None]
    same = [path for path, attempt in known if attempt == known[0][1]]
    return checkpoint_round(same[-1]) if same else None


def _attempt(path: Path) -> int | None:
    try:
        content = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return int(content["attempt"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove_old_checkpoints(folder: Path, *, keep: int, spared: Collection[int] = ()) -> list[Path]:
    """Remove all that is older than the newest `keep` whole checkpoints; returns what was removed.

    What a process that was killed had begun to write goes too.

    Args:
        folder: of the checkpoints.
        keep: how many stay.
        spared: rounds whose checkpoints stay besides.
    """
    kept = checkpoints_newest_first(folder)[:keep]
    old = [path for path in _folders(folder) if kept and path.name < kept[-1].name]
    removed = [path for path in old if checkpoint_round(path) not in spared]
    removed += sorted(folder.glob(f".{_PREFIX}*.partial"))
    for path in removed:
        shutil.rmtree(path)
    return removed


def _folders(folder: Path) -> list[Path]:
    """What has a checkpoint's name, oldest first."""
    named = (path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())
    return sorted(path for path in named if path.name.removeprefix(_PREFIX).isdecimal())


def _save_model(policy: Policy, file: Path) -> None:
    weights = {name: tensor.contiguous().cpu() for name, tensor in policy.named_weights()}
    save_file(weights, file, metadata={"format": "pt"})
    policy.model.config.save_pretrained(file.parent)
    policy.model.generation_config.save_pretrained(file.parent)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files; a full disk is an OSError, whatever the library raises."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # The tokenizers library raises a bare Exception on a full disk; anything narrower is ours.
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error


def _moments(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by weight name; empty before the first step."""
    table = {}
    for name, weight in policy.masters.items():
        for key, value in optimizer.state.get(weight, {}).items():
            table[f"{name}/{key}"] = value.detach().contiguous().cpu()
    return table


def _restore_moments(
    table: Mapping[str, Tensor], policy: Policy, optimizer: torch.optim.Optimizer
) -> None:
    optimizer.state.clear()
    for name, weight in policy.masters.items():
        state = {
            key.rpartition("/")[2]: value
            for key, value in table.items()
            if key.rpartition("/")[0] == name
        }
        if state:
            # Moments follow their weight, and so does the step counter of a fused AdamW; any other
            # keeps it on the CPU.
            follows = optimizer.param_groups[0]["fused"]
            optimizer.state[weight] = {
                key: value if key == "step" and not follows else value.to(weight.device)
                for key, value in state.items()
            }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
