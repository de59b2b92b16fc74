"""A federation for people: its rounds, and what became of each client's updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from gmpo.federated.aggregation import Aggregation
from gmpo.federated.records import RoundReport
from gmpo.text_tables import open_table

__all__ = ["clients_table", "rounds_table", "shares_table"]


def rounds_table(reports: Sequence[RoundReport]) -> Table:
    """A row a round: what became of it, what the model can do, how far it is from the pool."""
    suites = list(reports[-1].accuracy)
    heads = ["round", "outcome", "model", *suites, "gap / spread", "s"]
    table = open_table(heads, title="rounds", left=3)
    for report in reports:
        gap = "-"
        if report.gap is not None:
            gap = f"{report.gap.gap:.2g} / {report.gap.spread:.2g}"
        table.add_row(
            str(report.number),
            report.outcome.replace("_", " "),
            report.model[:8],
            *(f"{report.accuracy[name]:.3f}" for name in suites),
            gap,
            f"{report.seconds:.0f}",
        )
    return table


def clients_table(reports: Sequence[RoundReport]) -> Table:
    """A row for each client in each round: its weight, or why it had none."""
    heads = ["round", "client", "left out", "sequences", "length", "cosine", "weight", "reward"]
    table = open_table(heads, title="clients", left=3)
    for report in reports:
        shares = _shares(report)
        for row in report.clients:
            share = shares.get(row.client)
            reward = "-"
            if row.reward_start is not None and row.reward_end is not None:
                reward = f"{row.reward_start:.3f} to {row.reward_end:.3f}"
            why = row.message if row.outcome == "diverged" else (share or {}).get("left_out", "")
            table.add_row(
                str(report.number),
                Text(row.client),
                Text(why),
                str(row.sequences),
                _number(share, "norm"),
                _number(share, "cosine"),
                _number(share, "weight"),
                reward,
            )
    return table


def shares_table(made: Aggregation) -> Table:
    """A row for each update: its weight, or why it had none."""
    heads = ["client", "left out", "sequences", "length", "cosine", "weight"]
    table = open_table(heads, title=made.rule.replace("_", " "), left=2)
    for share in made.shares:
        length = "-" if share.norm is None else f"{share.norm:.4g}"
        table.add_row(
            Text(share.client),
            Text(share.left_out),
            str(share.sequences),
            length,
            f"{share.cosine:.3f}",
            f"{share.weight:.3f}",
        )
    return table


def _shares(report: RoundReport) -> dict[str, Mapping[str, Any]]:
    """Of the model that was accepted, or tried last."""
    if not report.attempts:
        return {}
    return {share["client"]: share for share in report.attempts[-1].aggregation["shares"]}


def _number(share: Mapping[str, Any] | None, key: str) -> str:
    if share is None or share[key] is None:
        return "-"
    return f"{share[key]:.4g}" if key == "norm" else f"{share[key]:.3f}"
