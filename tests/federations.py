"""Federations of a tiny model, for tests of more than one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from safetensors.numpy import load_file
from tests.tiny_runs import tiny_recipe, write_recipe

from gmpo.config import RunConfig
from gmpo.continual.plan import write_rows
from gmpo.federated import (
    Coordinator,
    FederatedPlan,
    Federation,
    RoundReport,
    open_federation,
    resolve_federation,
)
from gmpo.outcomes import Way, prompt_digest
from gmpo.recipe import settings_of
from gmpo.suites import SuiteItems
from gmpo.suites.runs import Asking, ask_suites
from gmpo.tasks import jsonl_task


def write_items(folder: Path, model: str) -> Path:
    """Questions whose answers are what the model says greedily: it is right on all of them."""
    rows = [{"id": f"i{n}", "prompt": f"{n}+{n}=", "answer": "0"} for n in range(100, 900)]
    write_rows(folder / "asked.jsonl", rows)
    prompts = jsonl_task(path=str(folder / "asked.jsonl")).train
    suite = SuiteItems(name="s", title="s", prompts=prompts, max_tokens=3)
    asking = Asking(ways=(Way(name="greedy"),))
    (outcomes,) = ask_suites(tiny_recipe(model), [suite], asking, label="m")
    said = {item.digest: item.completions[0].answer for item in outcomes.items}
    kept = [
        {"id": prompt.id, "prompt": rows[place]["prompt"], "answer": answer}
        for place, prompt in enumerate(prompts)
        if (answer := said[prompt_digest(prompt)]) is not None
    ]
    assert len(kept) >= 100
    write_rows(folder / "items.jsonl", kept)
    return folder / "items.jsonl"


def federation(folder: Path, model: str, items: Path, **changes: Any) -> Federation:
    """Three clients with twenty sums each."""
    slow = {"training__learning_rate": 1e-5, **changes.pop("recipe", {})}  # accuracy may not fall
    recipe: RunConfig = tiny_recipe(model, **slow)
    names = changes.pop("names", ("north", "south", "east"))
    clients = {}
    for place, name in enumerate(names):
        path = folder / f"{name}.jsonl"
        rows = range(20 * place, 20 * place + 20)
        write_rows(path, [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in rows])
        clients[name] = {"task": {"kind": "jsonl", "path": str(path), "instruction": ""}}
    for name, own in changes.pop("own", {}).items():
        clients[name] |= own
    table = {
        "recipe": write_recipe(folder / "tiny.toml", recipe),
        "rounds": 2,
        "clients": clients,
        "judging": {"suites": {"own": str(items)}, "items": 60},
        "aggregation": {"least_cosine": -1.0, **changes.pop("aggregation", {})},
        "gap_items": 4,
        **changes,
    }
    return resolve_federation(settings_of(FederatedPlan, table, of="plan"))


def run(place: Path, asked: Federation | None, **options: Any) -> list[RoundReport]:
    folder, found = open_federation(place, asked)
    with folder.locked():
        return Coordinator.open(folder, found, threads=1, **options).run()


def same_models(one: Path, other: Path) -> bool:
    left, right = (load_file(folder / "model.safetensors") for folder in (one, other))
    return left.keys() == right.keys() and all(np.array_equal(left[k], right[k]) for k in left)


def plan_file(folder: Path, asked: Federation) -> Path:
    path = folder / "plan.toml"
    path.write_text(tomli_w.dumps(asked.plan.model_dump(mode="json", exclude_none=True)))
    return path
