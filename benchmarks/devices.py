"""Where a side computes: waiting for it, its peak memory and its name.

On the CPU peak memory is the process's largest resident memory; on a GPU it is what tensors took of
the GPU at most, and times are read after all work that was begun there has ended.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks import worker
from gmpo.policy.load import choose_dtype

__all__ = [
    "DEVICES",
    "add_precision",
    "device_name",
    "forget_peak_memory",
    "peak_memory_gib",
    "resolve_precision",
    "wait_for",
]

DEVICES = ("cpu", "cuda")


def wait_for(device: str) -> None:
    """Return once the device has done everything that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def forget_peak_memory(device: str) -> None:
    """Start a new measurement of the peak."""
    worker.forget_peak_memory()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gib(device: str) -> float:
    """Largest memory since `forget_peak_memory`: of the GPU's, or resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return worker.peak_memory_gib()


def device_name(device: str) -> str:
    """The GPU's name, or "cpu", whose processor is named elsewhere."""
    return torch.cuda.get_device_name() if device == "cuda" else device


def add_precision(parser: argparse.ArgumentParser, *, what: str) -> None:
    """`--dtype`, to be resolved by `resolve_precision` once the options are parsed."""
    parser.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help=f"{what}; auto, its default, is bf16 where the CPU is faster in it",
    )


def resolve_precision(arguments: argparse.Namespace) -> None:
    """Put what `auto` takes on this CPU in its place, and say it."""
    arguments.dtype = choose_dtype(arguments.dtype, device=torch.device("cpu"), warn=print)
