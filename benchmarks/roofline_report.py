"""The roofline's report as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.parts import parts_table
from benchmarks.spread import Spread

BY_TORCH = "gradient with torch's operations"
"""The same gradient without the compiled functions: what these give, in the same run."""
DECODE_BY_TORCH = "decode with torch's operations"
"""The same decoding steps without them."""


def timing_tables(report: Mapping[str, Any]) -> str:
    """Peaks, decoding and updates against their bounds, and their parts."""
    title = (
        f"{report['model']}, {report['dtype']}, {report['made_with']['processor']}, "
        f"{report['threads']} threads"
    )
    return "\n\n".join(
        [title, peaks_table(report["peaks"]), bounds_table(report), *part_tables(report)]
    )


def peaks_table(peaks: Mapping[str, Any]) -> str:
    """Every product in both precisions, and copying."""
    lines = ["| product | fp32, GFLOP/s | bf16, GFLOP/s |", "|---|---|---|"]
    for name in peaks["fp32"]:
        rates = (scaled(peaks[dtype][name], 1e-9).text() for dtype in ("fp32", "bf16"))
        lines.append(f"| {name} | {' | '.join(rates)} |")
    lines += ["", "| copy, or scaling in place | GB/s, read and written |", "|---|---|"]
    lines += [f"| {name} | {scaled(rate, 1e-9).text()} |" for name, rate in peaks["copy"].items()]
    return "\n".join(lines)


def bounds_table(report: Mapping[str, Any]) -> str:
    """Decoding, every update and its two pieces against their bounds."""
    decode = report["decode"]
    rows = {f"decode, {decode['rows']} rows at position {decode['position']}": decode}
    rows[DECODE_BY_TORCH] = decode[DECODE_BY_TORCH]
    for name, update in report["updates"].items():
        rows[f"update, {name}"] = update
        pieces = {**update["pieces"], BY_TORCH: update[BY_TORCH]}
        rows |= {f"update, {name}: {piece}": of for piece, of in pieces.items()}
    lines = ["| work | ms | bound, ms | share of the bound |", "|---|---|---|---|"]
    for name, of in rows.items():
        cells = [scaled(of[key], 1e3).text() for key in ("seconds", "bound_seconds")]
        lines.append(f"| {name} | {' | '.join(cells)} | {scaled(of['share'], 1).text(2)} |")
    return "\n".join(lines)


def part_tables(report: Mapping[str, Any]) -> Iterator[str]:
    """Where decoding's and each update piece's time goes."""
    decode = report["decode"]
    yield parts_table("decode", decode["parts"], decode["part_bounds"])
    for name, update in report["updates"].items():
        for piece, of in update["pieces"].items():
            yield parts_table(f"update, {name}: {piece}", of["parts"], {})


def counted_table(counted: Mapping[str, Any]) -> str:
    """TFLOP of a round, gmpo's and TRL's, and how many times TRL's are gmpo's."""
    lines = [
        "| workload | lengths | live groups | gmpo rollouts | old | gradients | TRL rollouts | old "
        "| gradients | TRL / gmpo: rollouts | update | round | in fp32: update | round |",
        "|" + "---|" * 14,
    ]
    for name, workload in counted.items():
        for one in workload["rounds"]:
            gmpo, trl = one["gmpo"], one["trl"]
            cells = [name, one["lengths"], f"{one['live_groups']} of {one['groups']}"]
            for side in (gmpo, trl):
                stages = ("rollouts", "old_logprobs", "gradients")
                cells += [f"{side[stage] / 1e12:.3f}" for stage in stages]
            in_fp32 = count_ratios(gmpo | {"old_logprobs": 0} | one["gmpo_trusting_sampler"], trl)
            ratios = [*count_ratios(gmpo, trl).values(), in_fp32["update"], in_fp32["round"]]
            cells += [f"{ratio:.2f}" for ratio in ratios]
            lines.append(f"| {' | '.join(cells)} |")
    note = (
        'TFLOP a round; "old" are the old log-probabilities, "update" is old and gradients. In '
        "fp32 gmpo has no pass over old log-probabilities: its sampler's are taken."
    )
    return "\n".join([note, "", *lines])


def count_ratios(gmpo: Mapping[str, int], trl: Mapping[str, int]) -> dict[str, float]:
    """TRL's operations over gmpo's, for rollouts, update and round."""

    def update(of: Mapping[str, int]) -> int:
        return of["old_logprobs"] + of["gradients"]

    return {
        "rollouts": trl["rollouts"] / gmpo["rollouts"],
        "update": update(trl) / update(gmpo),
        "round": trl["round"] / gmpo["round"],
    }


def scaled(of: Mapping[str, float], factor: float) -> Spread:
    return Spread(**{key: factor * value for key, value in of.items()})
