"""TRL and gmpo in turns on one workload: TRL's best setting by a trial, then pairs of rounds."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from typing import Any, Protocol

from benchmarks.exchange import Scratch
from benchmarks.options import BenchmarkError
from benchmarks.ratios import (
    UpdatesDiffer,
    bounds_of,
    complaint,
    is_left_to_fp32,
    own_complaint,
    require_same_update,
    summary,
)
from benchmarks.results import Results
from benchmarks.worker import TookTooLong, Worker, WorkerFailed
from benchmarks.workloads import SGD_LEARNING_RATES, STEPS_PER_ROUND, Workload

PRECISIONS = ("fp32", "bf16_autocast", "bf16_weights")
ROLLOUTS = ("generate", "static_cache", "continuous_batching")
VARIANTS = ("as_sampled", "no_dead")
ALLOWED_PRECISIONS = {
    "auto": PRECISIONS,
    "fp32": ("fp32",),
    "bf16": ("bf16_autocast", "bf16_weights"),
}
"""TRL's precisions that gmpo's `dtype` is compared with."""
BEST_SETUPS = {"fp32": "fp32/static_cache", "bf16": "bf16_autocast/generate"}
"""TRL's setting by gmpo's dtype for benchmarks that hold no trial: in those of docs/experiments.md
the fastest, or in fp32 as fast as `generate` within the scatter."""
CLOSE = 2.0
"""Settings within so many times the fastest one's seconds are tried once more: a single round was
seen to take 1.84 times as long as another of the same setting. A round that takes longer is ended:
without bf16 units one in bf16 may take ten times as long."""
LEAST_PATIENCE = 60.0
"""Seconds before which no round is ended."""
COMPARED = ("difference", "cosine", "gradient_cosine")
"""What a replay says of how far gmpo's work is from TRL's."""


TRL_RELEASES = "1.16"
"""The series that the benchmarks drive through its private methods, as pyproject.toml pins it."""


def require_trl() -> None:
    """Raises BenchmarkError where TRL is missing or of another series."""
    try:
        found = version("trl")
    except PackageNotFoundError:
        found = "none"
    if not f"{found}.".startswith(f"{TRL_RELEASES}."):
        raise BenchmarkError(f"TRL {TRL_RELEASES} is needed, found {found}: pip install '.[trl]'")


class Side(Protocol):
    """A worker, or what stands in its place within one process."""

    def ask(self, command: str, *, within: float | None = None, **arguments: Any) -> dict[str, Any]:
        """The command's answer, see `Worker.ask`."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a comparison is made with.

    Attributes:
        workload: what is timed.
        dtype: gmpo's.
        threads: of each side.
        scratch: files that the sides exchange; starting weights lie there.
        say: told what happens, a line each.
        device: of both sides.
        trl_micro_batch: most rows that TRL runs at once in an update; None is a whole step's.
    """

    workload: Workload
    dtype: str
    threads: int
    scratch: Scratch
    say: Callable[[str], None]
    device: str = "cpu"
    trl_micro_batch: int | None = None

    def trl(self, setup: str) -> AbstractContextManager[Side]:
        """A TRL worker run as the named setup says."""
        precision, _, rollouts = setup.partition("/")
        return self._trl({"precision": precision, "rollouts": rollouts})

    def exact_trl(self) -> AbstractContextManager[Side]:
        """TRL in fp32, to be asked and not to be timed: layers run again, which saves memory."""
        setup = {"precision": "fp32", "rollouts": "generate", "gradient_checkpointing": True}
        return self._trl(setup)

    def _trl(self, setup: Mapping[str, Any]) -> AbstractContextManager[Side]:
        whole = {**setup, "micro_batch": self.trl_micro_batch}
        return self._worker("benchmarks.trl_side", {"setup": whole})

    def gmpo(self) -> AbstractContextManager[Side]:
        return self._worker("benchmarks.gmpo_side", {"dtype": self.dtype})

    @contextmanager
    def _worker(self, module: str, settings: Mapping[str, Any]) -> Iterator[Side]:
        common = {
            "workload": asdict(self.workload),
            "threads": self.threads,
            "scratch": str(self.scratch.folder),
            "device": self.device,
        }
        with Worker(module, common | settings) as worker:
            yield worker


def setups_of(dtype: str) -> list[str]:
    """The names of TRL's settings that gmpo's dtype is compared with."""
    return ["/".join(pair) for pair in product(ALLOWED_PRECISIONS[dtype], ROLLOUTS)]


def add_trl_setup(parser: argparse.ArgumentParser, *, otherwise: str | None = None) -> None:
    """`--trl`, how TRL is run; where no trial is held, to be read by `trl_setup_of`.

    Args:
        parser: of the benchmark.
        otherwise: what happens where it is not given; None takes the best of trials.
    """
    best = ", ".join(f"{setup} in {dtype}" for dtype, setup in BEST_SETUPS.items())
    parser.add_argument(
        "--trl",
        choices=setups_of("auto"),
        metavar="SETTING",
        help=f"one of {', '.join(setups_of('auto'))}; unless given, {otherwise or best}",
    )


def why_not_compared(setup: str, dtype: str) -> str | None:
    """Why TRL in this setting does not meet gmpo in this dtype; None if it does."""
    if setup in setups_of(dtype):
        return None
    return (
        f"--trl {setup} is not compared with --dtype {dtype}; choose from "
        f"{', '.join(setups_of(dtype))}"
    )


def trl_setup_of(arguments: argparse.Namespace) -> str:
    """TRL's setting that was named, or the best for the dtype.

    Raises:
        BenchmarkError: it is not compared with the dtype.
    """
    setup: str = arguments.trl or BEST_SETUPS[arguments.dtype]
    if why := why_not_compared(setup, arguments.dtype):
        raise BenchmarkError(why)
    return setup


def choose_setup(bench: Bench, results: Results) -> str:
    """TRL's fastest setting that does the update, from rounds of each on fewer prompts.

    Each setting does one round, and those close to the fastest another; a setting's faster round
    counts. A round that takes far longer than the fastest one before is ended. A setting that
    failed is tried again when the trial goes on.

    Raises:
        BenchmarkError: no setting of TRL works and does.
    """
    trial: dict[str, Any] = results.content.setdefault("trial", {})
    few = replace(bench.workload, prompts_per_round=STEPS_PER_ROUND)
    smaller = replace(bench, workload=few)
    setups = setups_of(bench.dtype)
    missing = [name for name in setups if name not in trial or "failed" in trial[name]]
    if missing:
        bench.say(
            f"trial of TRL without vLLM: a round of {few.prompts_per_round} prompts x "
            f"{few.group_size}, gradient checkpointing off"
        )
        with smaller.gmpo() as gmpo:
            for setup in missing:
                trial[setup] = tried(smaller, setup, gmpo, within=patience(trial))
                results.save()
                bench.say(trial_line(setup, trial[setup]))
    repeat_close(smaller, trial, results)
    usable = usable_of(trial)
    if not usable:
        reasons = "; ".join(f"{name}: {each['excluded']}" for name, each in trial.items())
        raise BenchmarkError(
            f"no setting of TRL can be compared with: {reasons}. --trl SETTING takes one untried"
        )
    return min(usable, key=lambda name: fastest_round(usable[name]))


def repeat_close(bench: Bench, trial: dict[str, Any], results: Results) -> None:
    """A second round of each setting that one alone does not tell from the fastest."""
    usable = usable_of(trial)
    if not usable:
        return
    limit = CLOSE * min(each["round_seconds"] for each in usable.values())
    close = [name for name, each in usable.items() if each["round_seconds"] <= limit]
    if len(close) == 1:
        return
    for setup in close:
        if "again" in trial[setup]:
            continue
        with bench.trl(setup) as trl:
            again = trl.ask("round", number=0, live_groups=bench.workload.prompts_per_round)
        trial[setup]["again"] = again
        results.save()
        bench.say(f"  {setup:34} {again['round_seconds']:7.1f} s, once more")


def usable_of(trial: Mapping[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in trial.items() if each["excluded"] is None}


def fastest_round(figures: Mapping[str, Any]) -> float:
    """Seconds of a tried setting's only round, or of the faster one of two."""
    return min(each["round_seconds"] for each in (figures, figures.get("again", figures)))


def patience(trial: Mapping[str, Any]) -> float | None:
    """Seconds after which another setting's round is ended; None before one is usable."""
    seconds = [fastest_round(each) for each in usable_of(trial).values()]
    return max(LEAST_PATIENCE, CLOSE * min(seconds)) if seconds else None


def tried(bench: Bench, setup: str, gmpo: Side, *, within: float | None) -> dict[str, Any]:
    """Figures of one round, and why the setting is excluded, or None.

    A setting whose update is gmpo's is used. Where it is not, either may have been led away, and
    TRL in fp32 tells about this one, as it tells about gmpo in `hold_to_trl`. The setting is not
    excluded for what gmpo does: then the comparison itself is refused, in the warm-up or a pair.

    Args:
        bench: on fewer prompts.
        setup: of TRL.
        gmpo: replays the round.
        within: seconds that the round may take; None is as long as it likes.
    """
    asked = {"number": 0, "live_groups": bench.workload.prompts_per_round}
    with bench.trl(setup) as trl:
        try:
            trl.ask("about")  # loading is not the round's time
            figures = trl.ask("round", within=within, **asked)
        except TookTooLong:
            reason = f"its round was ended after {within:.0f} s, far more than another took"
            return {"ended_after": within, "excluded": reason}
        except WorkerFailed as failure:
            reason = f"it failed: {str(failure).strip().splitlines()[-1]}"
            return {"failed": True, "excluded": reason}
    replayed = gmpo.ask("replay", number=0)
    bounds = bounds_of(both_fp32=is_fp32(setup) and gmpo.ask("about")["dtype"] == "fp32")
    compared = {name: replayed[name] for name in COMPARED}
    figures |= compared
    if complaint(compared, "adamw", bounds) is None:
        return {**figures, "excluded": None}
    with bench.exact_trl() as exact:
        theirs = exact.ask("replay", **asked)
    to_fp32 = {name: theirs[name] for name in ("cosine", "gradient_cosine")}
    return {**figures, "to_fp32": to_fp32, "excluded": own_complaint(to_fp32, bounds)}


def is_fp32(setup: str) -> bool:
    return setup.partition("/")[0] == "fp32"


def trial_line(setup: str, figures: Mapping[str, Any]) -> str:
    line = f"  {setup:34}"
    if "round_seconds" in figures:
        line += (
            f" {figures['round_seconds']:7.1f} s (rollout {figures['rollout_seconds']:.1f}, "
            f"update {figures['update_seconds']:.1f}), cosine {figures['cosine']:.4f}, "
            f"of first gradients {figures['gradient_cosine']:.4f}"
        )
    if "to_fp32" in figures:
        line += f"; its own to TRL in fp32 {figures['to_fp32']['cosine']:.4f}"
    if figures["excluded"] is not None:
        line += f"  excluded: {figures['excluded']}"
    return line


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Both sides at work, and whether both compute in fp32."""

    trl: Side
    gmpo: Side
    both_fp32: bool


def warm_up(bench: Bench, sides: Sides, results: Results) -> None:
    """One untimed round each, with SGD: whether the gradients agree on the same completions.

    Raises:
        BenchmarkError: the sides end completions at different tokens.
        UpdatesDiffer: they do not agree.
    """
    theirs, ours = sides.trl.ask("about")["end_tokens"], sides.gmpo.ask("about")["end_tokens"]
    if theirs != ours:
        raise BenchmarkError(
            f"TRL ends completions at tokens {theirs} and gmpo at {ours}; set eos_token_id in the "
            "model's generation config to all of them"
        )
    all_groups = bench.workload.prompts_per_round
    rate = SGD_LEARNING_RATES["fp32" if sides.both_fp32 else "bf16"]
    sides.gmpo.ask("round", number=0, live_groups=all_groups)
    sides.trl.ask("round", number=0, live_groups=all_groups, sgd_learning_rate=rate)
    compared = sides.gmpo.ask("replay", number=0, sgd_learning_rate=rate)
    check: dict[str, Any] = {name: compared[name] for name in COMPARED}
    results.content["sgd_check"] = check
    results.save()
    bench.say(
        f"warm-up: |d_gmpo - d_trl| / |d_trl| with SGD {compared['difference']:.2e}, "
        f"cosine {compared['cosine']:.5f}; first gradients {compared['gradient_cosine']:.5f}"
    )
    exact = hold_to_trl(
        bench, sides, compared, number=0, live_groups=all_groups, sgd_learning_rate=rate
    )
    if exact is not None:
        check["exact"] = exact
        results.save()


def run_pairs(bench: Bench, sides: Sides, results: Results, *, variant: str, wanted: int) -> None:
    """Rounds in turns until the file holds as many pairs as wanted; each is saved at once.

    Raises:
        UpdatesDiffer: gmpo's update of a replayed round is not TRL's, see `hold_to_trl`.
    """
    variants = results.content.setdefault("variants", {})
    entry: dict[str, Any] = variants.setdefault(variant, {"pairs": []})
    pairs: list[dict[str, Any]] = entry["pairs"]
    live_groups = bench.workload.prompts_per_round if variant == "no_dead" else None
    while len(pairs) < wanted:
        number = len(pairs) + 1  # round 0 was the warm-up
        pair = run_pair(sides, number=number, live_groups=live_groups)
        exact = hold_to_trl(bench, sides, pair["replay"], number=number, live_groups=live_groups)
        if exact is not None:
            pair["exact"] = exact
        pairs.append(pair)
        variants[variant] = entry = {**summary(pairs), "pairs": pairs}
        results.save()
        bench.say(pair_line(variant, number, pair))


def hold_to_trl(
    bench: Bench,
    sides: Sides,
    compared: Mapping[str, float],
    *,
    number: int,
    live_groups: int | None,
    sgd_learning_rate: float | None = None,
) -> dict[str, float] | None:
    """Require that gmpo's update is TRL's, and where only its cosine misses, TRL's in fp32.

    Rounding alone parts two updates that follow different first steps: a ratio on the other side
    of a clip's border takes its token's gradient with it. TRL's own update of the same completions
    in fp32 is then what gmpo's has to agree with, to the same bound.

    Args:
        bench: what starts TRL in fp32.
        sides: of the round, which TRL has done last.
        compared: gmpo's replay of it.
        number: of the round.
        live_groups: as it had them.
        sgd_learning_rate: as it had it; None of AdamW.

    Returns:
        Figures of gmpo's replay against TRL in fp32, and "trl_cosine" of TRL's own update; None
        where TRL in fp32 was not asked.

    Raises:
        UpdatesDiffer: gmpo's update is neither.
    """
    bounds = bounds_of(both_fp32=sides.both_fp32)
    optimizer = "adamw" if sgd_learning_rate is None else "sgd"
    reason = complaint(compared, optimizer, bounds)
    if reason is None or not is_left_to_fp32(compared, optimizer, bounds):
        require_same_update(compared, optimizer, bounds)
        return None
    bench.say(f"round {number}: {reason}; TRL in fp32 takes the same completions")
    for side in (sides.trl, sides.gmpo):  # a third process needs memory beside them
        side.ask("give_back")
    with bench.exact_trl() as exact:
        theirs = exact.ask(
            "replay", number=number, live_groups=live_groups, sgd_learning_rate=sgd_learning_rate
        )
    ours = sides.gmpo.ask("replay", number=number, sgd_learning_rate=sgd_learning_rate)
    found = {name: float(ours[name]) for name in COMPARED} | {"trl_cosine": theirs["cosine"]}
    bench.say(
        f"round {number}: cosine to TRL's update in fp32: TRL's own {found['trl_cosine']:.4f}, "
        f"gmpo's {found['cosine']:.4f}"
    )
    try:
        require_same_update(found, optimizer, bounds)
    except UpdatesDiffer as refusal:
        raise UpdatesDiffer(
            f"{refusal}. TRL's own update in bf16 has a cosine of {found['trl_cosine']:.4f} to its "
            "update in fp32; --dtype fp32 compares both sides without such rounding"
        ) from refusal
    return found


def run_pair(sides: Sides, *, number: int, live_groups: int | None) -> dict[str, Any]:
    """A round of each side on the same prompts, and gmpo's update of TRL's round."""
    asked = {"number": number, "live_groups": live_groups}
    pair: dict[str, Any] = {}
    # In turns, so that no side always runs on the warmer machine.
    for side in ("trl", "gmpo") if number % 2 else ("gmpo", "trl"):
        worker = sides.trl if side == "trl" else sides.gmpo
        pair[side] = worker.ask("round", **asked)
    pair["replay"] = sides.gmpo.ask("replay", number=number)
    return pair


def pair_line(variant: str, number: int, pair: Mapping[str, Mapping[str, Any]]) -> str:
    trl, gmpo, replay = pair["trl"], pair["gmpo"], pair["replay"]
    return (
        f"{variant} pair {number}: round {trl['round_seconds']:.1f} / "
        f"{gmpo['round_seconds']:.1f} s, rollout {trl['rollout_seconds']:.1f} / "
        f"{gmpo['rollout_seconds']:.1f} s, update of TRL's rows {trl['update_seconds']:.1f} / "
        f"{replay['update_seconds']:.1f} s, live {trl['live_share']:.2f} / "
        f"{gmpo['live_share']:.2f}, peak {trl['peak_gib']:.2f} / {gmpo['peak_gib']:.2f} GiB, "
        f"cosine {replay['cosine']:.4f}, of first gradients {replay['gradient_cosine']:.4f}"
    )
