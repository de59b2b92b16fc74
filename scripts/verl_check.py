"""gmpo's loss for verl beside verl 0.9.1's own `geo_mean`, on the same tensors and splits.

verl pins an older transformers, so it gets an environment of its own (1.4 GB), which the first run
builds. verl itself loads gmpo's adapter there, by VERL_USE_EXTERNAL_MODULES. A mini-batch of 8 rows
is cut into micro-batches whose losses are added up, as verl's engine does.

    python -m scripts.verl_check --json docs/results/verl.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.options import ends_clearly, results_file

REPOSITORY = Path(__file__).resolve().parents[1]
VERL = "verl==0.9.1"
# What importing verl's losses and gmpo's objective needs, and no more: verl's own list holds
# trackers, data libraries and GPU kernels.
PACKAGES = (
    "torch==2.13.0",
    "numpy==2.4.6",
    "transformers==5.10.4",
    "tensordict==0.10.0",
    "ray==2.60.0",
    "hydra-core==1.3.8",
    "codetiming==1.4.0",
    "jaxtyping==0.3.11",
)
NUM_ROWS, NUM_TOKENS, CLIP = 8, 12, 0.4
SPLITS = ((8,), (2, 2, 2, 2), (5, 2, 1), (1,) * 8)
EXACT = 1e-6
"""Largest relative difference of a row's weight, in fp64."""


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=REPOSITORY / ".venv-verl")
    parser.add_argument(
        "--json", type=results_file, metavar="FILE", help="write every figure here too"
    )
    parser.add_argument(
        "--inside", action="store_true", help="compare, in an environment with verl"
    )
    arguments = parser.parse_args(argv)
    if arguments.inside:
        return compare(arguments.json)
    make_environment(arguments.venv)
    # By its path: in that environment another package is called "scripts".
    command = [str(arguments.venv / "bin" / "python"), __file__, "--inside"]
    if arguments.json:
        command += ["--json", str(arguments.json.resolve())]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "src"))),
        "VERL_USE_EXTERNAL_MODULES": "gmpo.adapters.verl",
    }
    return subprocess.run(command, check=False, env=environment).returncode


def make_environment(folder: Path) -> None:
    """Build the environment unless it was finished before."""
    finished = folder / ".finished"
    wanted = "\n".join((*PACKAGES, VERL))
    if finished.is_file() and finished.read_text() == wanted:
        return
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [
        str(folder / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "-q",
        "--progress-bar",
        "off",
    ]
    subprocess.run([*install, *PACKAGES], check=True)
    subprocess.run([*install, "--no-deps", VERL], check=True)
    finished.write_text(wanted)


def compare(file: Path | None) -> int:
    """Both losses on every split against the mean of `gmpo_terms` over the whole mini-batch."""
    rows = [measure(name, split, tensors()) for name in ("gmpo", "geo_mean") for split in SPLITS]
    for row in rows:
        weights = ", ".join(f"{weight:.3g}" for weight in row["row_weights"])
        print(
            f"{row['loss']:8} micro-batches of {'+'.join(map(str, row['split'])):15} "
            f"gradient x {row['gradient_scale']:.4f}, off by {row['relative_difference']:.1e}; "
            f"row weights {weights}"
        )
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        packages = ("verl", "torch", "transformers", "tensordict")
        made_with = {name: version(name) for name in packages}
        report = {"made_with": made_with, "clip": CLIP, "comparisons": rows}
        file.write_text(json.dumps(report, indent=1) + "\n")
    return int(not all(row["as_expected"] for row in rows))


def measure(name: str, split: tuple[int, ...], batch: dict[str, Any]) -> dict[str, Any]:
    """The gradient of the micro-batches' summed losses, against that of the mean over all rows."""
    from gmpo.objective import gmpo_terms

    policy = batch["log_prob"]
    expected_loss = gmpo_terms(
        policy_logprobs=policy,
        old_logprobs=batch["old_log_prob"],
        advantages=batch["advantages"][:, 0],
        mask=batch["response_mask"].bool(),
        clip_low=CLIP,
        clip_high=CLIP,
    ).loss.mean()
    expected = gradient(expected_loss, policy)
    total = summed_loss(name, split, batch)
    found = gradient(total, policy)
    difference = float((found - expected).norm() / expected.norm())
    # A row's gradient over what it should be; verl's own mean over m rows gives 8 / m.
    row_weights = (found.norm(dim=1) / expected.norm(dim=1)).tolist()
    by_size = [NUM_ROWS / size for size in split for _ in range(size)]
    wanted = by_size if name == "geo_mean" else [1.0] * NUM_ROWS
    return {
        "loss": name,
        "split": split,
        "value": total.item(),
        "expected_value": expected_loss.item(),
        "gradient_scale": float(found.norm() / expected.norm()),
        "relative_difference": difference,
        "row_weights": row_weights,
        "as_expected": all(
            math.isclose(weight, want, rel_tol=EXACT)
            for weight, want in zip(row_weights, wanted, strict=True)
        ),
    }


def summed_loss(name: str, split: tuple[int, ...], batch: dict[str, Any]) -> Any:
    """What verl's engine accumulates: each micro-batch's loss by the function in its registry."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import FSDPActorConfig

    config = FSDPActorConfig(
        rollout_n=NUM_ROWS,
        ppo_micro_batch_size_per_gpu=max(split),
        clip_ratio=CLIP,
        clip_ratio_low=CLIP,
        clip_ratio_high=CLIP,
    )
    # As verl's `ppo_loss` fills it for every micro-batch.
    config.global_batch_info.update(
        dp_size=1,
        batch_num_tokens=int(batch["response_mask"].sum()),
        global_batch_size=NUM_ROWS,
        loss_scale_factor=None,
    )
    total, first = 0.0, 0
    for size in split:
        part = {key: value[first : first + size] for key, value in batch.items()}
        loss, _ = get_policy_loss_fn(name)(**part, loss_agg_mode="token-mean", config=config)
        total = total + loss
        first += size
    return total


def tensors() -> dict[str, Any]:
    """8 rows of 3 to 12 tokens in fp64, off-policy enough for both clips."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (NUM_ROWS, NUM_TOKENS)
    old = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    shift = 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([12, 3, 7, 5, 9, 4, 11, 6])
    advantages = torch.randn(NUM_ROWS, generator=generator, dtype=torch.float64)
    return {
        "old_log_prob": old,
        "log_prob": (old + shift).requires_grad_(),
        "advantages": advantages[:, None].expand(shape),
        "response_mask": (torch.arange(NUM_TOKENS) < lengths[:, None]).long(),
    }


def gradient(loss: Any, by: Any) -> Any:
    import torch

    return torch.autograd.grad(loss, by)[0]


if __name__ == "__main__":
    sys.exit(main())
