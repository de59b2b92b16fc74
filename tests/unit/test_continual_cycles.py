"""Many cycles with the real gate, registry and store, faults and kills: no harm gets through."""

from __future__ import annotations

import itertools
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.drawn_cycles import DrawnWork, adopted, finish_cycle
from tests.learning import NAME

from gmpo.store import Store, open_store


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is such a place: the disk's patience is not what is shown."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="gmpo-cycles-") as folder:
        yield Path(folder)


def run_cycles(folder: Path, count: int) -> Counter[str]:
    """One chain of cycles with faults: how they ended, what broke, and which drops went through."""
    with open_store(str(folder / "store.db")) as store:
        registry, first = adopted(store, folder)
        work = DrawnWork(
            store=store,
            registry=registry,
            faults=random.Random("faults"),
            fault_rate=0.05,
            skills={first: 0.0},
        )
        promoted = []
        seen: Counter[str] = Counter()
        for number in range(1, count + 1):
            serving = store.champion(NAME)
            result = finish_cycle(store, work, folder / "learn", number=number)
            now = store.champion(NAME)
            assert serving is not None
            assert now is not None
            assert result.number == number
            assert result.champion == serving.version
            seen[result.outcome] += 1
            if result.outcome == "promoted":
                assert now.version == result.new_model_version
                promoted.append(now.version)
            else:
                assert now.version == serving.version
            shutil.rmtree(folder / "learn")
            registry.collect_garbage(NAME, keep=1)
        cycles = store.cycles(NAME)
        assert [cycle.number for cycle in cycles] == list(range(1, count + 1))
        assert all(cycle.ended is not None for cycle in cycles)
        _require_evidence(store)
        gains = [v for v, delta in work.deltas.items() if delta > 0]
        assert len([v for v in gains if v in promoted]) > 0.6 * len(gains)
        for version, delta in work.deltas.items():
            seen[f"{delta:+.2f} made"] += 1
            seen[f"{delta:+.2f} promoted"] += version in promoted
        seen.update(work.seen)
        return seen


def _require_evidence(store: Store) -> None:
    """One chain of champions: each but the first passed a gate, or is the one before, back."""
    history = store.champion_history(NAME)
    assert [champion.revision for champion in history] == list(range(1, len(history) + 1))
    for before, after in itertools.pairwise(history):
        assert after.previous == before.version
        evidence = after.reason.get("evidence")
        if evidence is None:
            assert after.version == before.previous
        else:
            assert evidence["outcome"] == "pass"
            assert (evidence["champion"], evidence["candidate"]) == (before.version, after.version)


def test_fifty_cycles_with_faults_never_release_what_did_not_pass(tmp_path: Path):
    seen = run_cycles(tmp_path, 50)
    assert seen["-0.10 promoted"] == 0
    assert seen["Killed"] > 0
    assert seen["StoreLocked"] > 0


@pytest.mark.verify
def test_three_thousand_cycles_with_faults_never_release_what_did_not_pass(memory_folder: Path):
    seen = run_cycles(memory_folder, 3000)
    print(f"3,000 cycles: {dict(seen)}")
    assert seen["-0.10 promoted"] <= 3
    assert seen["-0.10 made"] > 300
