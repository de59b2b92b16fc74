"""Arithmetic whose bits are the same on every x86-64 processor with AVX2 and FMA.

Libraries hold several versions of a function, take the fastest one that the processor knows, and
round by what they took. In *portable* arithmetic each is told to take a version that all of these
processors have; *native* arithmetic is what libraries do unasked. They read what they are told when
they are loaded, so a process has one arithmetic from its start to its end:

    arithmetic.enter("portable", module="scripts.stability_study")
"""

from __future__ import annotations

import os
import platform
import re
import sys
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "KINDS",
    "VARIABLES",
    "Kind",
    "circumstances",
    "enter",
    "of_this_process",
]

Kind = Literal["native", "portable"]
KINDS: tuple[Kind, ...] = ("portable", "native")
VARIABLES = {
    # MKL, which multiplies matrices and takes torch's exponents and logarithms: the one branch that
    # it promises to be the same on processors of every maker. It uses nothing beyond SSE2.
    "MKL_CBWR": "COMPATIBLE",
    # torch's own loops, which are compiled for AVX2 with FMA and again for AVX-512.
    "ATEN_CPU_CAPABILITY": "avx2",
    # oneDNN writes its programs for the processor as it runs.
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    # gmpo's own C functions are compiled for the processor that they run on.
    "GMPO_KERNELS": "off",
    # Sums are cut where threads meet.
    "OMP_NUM_THREADS": "1",
}
"""What is told to whom. The C library's exp, log and pow need nothing: it has one version of each
for all processors with AVX2 and FMA. Of numpy a run takes integers, uniforms made of them, and
roots. Where the C functions are off, `gmpo.sampler.prepared` takes oneDNN's order of weights for
fp32. That it rounds alike on all processors was not tried: it decodes the Llama family alone, so
what is portable are models of other families."""
_REPLACED: list[torch.library.Library] = []
"""Operations of torch that this process does otherwise; they last as long as this does."""


def of_this_process() -> Kind:
    """The arithmetic that this process has had from its start."""
    is_told = all(os.environ.get(name) == value for name, value in VARIABLES.items())
    return "portable" if is_told else "native"


def enter(kind: Kind, *, module: str) -> None:
    """Begin this process anew in an arithmetic that it does not have; nothing if it has it.

    Args:
        kind: of arithmetic.
        module: that was started with `python -m`; it is started again with the same words.

    Raises:
        SystemExit: the processor or torch has no such arithmetic.
    """
    if of_this_process() != kind:
        others = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        told = {**others, **VARIABLES} if kind == "portable" else others
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], told)
    if kind == "portable":
        _require_avx2()
        _replace_estimates()


def circumstances() -> dict[str, str]:
    """What decides a result's bits besides versions of packages: arithmetic, processor, C library.

    In native arithmetic the processor does; in portable arithmetic it does not.
    """
    return {
        "arithmetic": of_this_process(),
        "processor": _processor(),
        "libc": " ".join(platform.libc_ver()),
    }


def _require_avx2() -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    if capability != "AVX2":
        raise SystemExit(
            f"torch computes with {capability} here, and portable arithmetic is that of processors "
            "with AVX2 and FMA; use one of those, or --arithmetic native"
        )


def _replace_estimates() -> None:
    """Take roots and logarithms elsewhere than from MKL, whatever it was told.

    Its functions for both begin with the processor's estimate of a reciprocal or of its root, which
    makers are free to choose: about every sixth root in fp32 is not the nearest number to the true
    one, and which ones depends on that estimate. Roots of numpy are the nearest numbers, as the
    instruction for them gives, and logarithms are the C library's.
    """
    if not _REPLACED:
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*other operators may also be overridden")
            library.impl("sqrt", _root, "CPU", allow_override=True)
            library.impl("log", _logarithm, "CPU", allow_override=True)
        _REPLACED.append(library)


def _root(values: Tensor) -> Tensor:
    wide = values if values.dtype in (torch.float32, torch.float64) else values.float()
    roots = torch.empty_like(wide)
    with np.errstate(invalid="ignore"):  # NaN of a negative number, as torch's
        np.sqrt(wide.detach().numpy(), out=roots.numpy())
    return roots.to(values.dtype) if values.is_floating_point() else roots


def _logarithm(values: Tensor) -> Tensor:
    return torch.special.xlogy(torch.ones_like(values), values)


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    told = file.read_text() if file.is_file() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", told, re.MULTILINE)
    return name[1].strip() if name else platform.processor() or "unknown"
