"""The C sources of this package, compiled once for this processor and loaded.

On a CPU torch runs a norm, a rotation or an activation as several operations, each of which reads
and writes all of its tokens; joined into one C function they are read and written once. The sources
need a C compiler and nothing else. They are compiled the first time that they are wanted, in a few
seconds, into the cache folder; where there is no compiler everything runs as torch's operations,
more slowly and equal to rounding.

`GMPO_KERNELS` decides: `auto` (the default) as said, `off` never compiles, `on` fails where it
cannot.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gmpo.errors import ConfigError, ModelError

__all__ = ["Build", "build", "cache_folder", "kernels_off", "loaded"]

_SOURCES = Path(__file__).parent
_MAIN_SOURCE = _SOURCES / "kernels.c"
_SECONDS = 120
"""A compiler that takes longer is stuck."""
_WIDE_VECTORS = ("-mprefer-vector-width=512",)
_NATIVE = ("-march=native",)
_ROUNDING = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_ALWAYS = ("-std=c11", "-O3", "-fPIC", *_ROUNDING)
_ATTEMPTS = (
    (*_ALWAYS, *_NATIVE, *_WIDE_VECTORS, "-fopenmp"),
    (*_ALWAYS, *_NATIVE, "-fopenmp"),
    (*_ALWAYS, *_NATIVE),
    _ALWAYS,
)
"""Flags from the fastest to those that every compiler knows; the first that compiles and loads is
taken. The object is linked without an OpenMP library: its threads must be those that torch has
loaded, since two pools of threads would wait for each other's processors."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """What came of compiling.

    Attributes:
        library: None where there is none.
        said: how it was made, or why there is none; one phrase.
        file: where the library lies.
    """

    library: ctypes.CDLL | None
    said: str
    file: Path | None = None


class _Held:
    """The process's one build, and whether it is in use."""

    build: Build | None = None
    is_off = False
    lock = threading.Lock()


def loaded() -> ctypes.CDLL | None:
    """The compiled functions, or None where torch's operations are to run.

    Raises:
        ConfigError: `GMPO_KERNELS` has another value than auto, on and off.
        ModelError: it is `on`, and nothing could be compiled.
    """
    return None if _Held.is_off else build().library


def build() -> Build:
    """The process's build, made now if it was not yet; raises as `loaded` does."""
    if _Held.build is None:
        with _Held.lock:
            if _Held.build is None:
                _Held.build = _built()
    return _Held.build


def cache_folder() -> Path:
    """Where files are kept that can be made again: dequantised weights, compiled functions."""
    return Path(os.environ.get("GMPO_CACHE", Path.home() / ".cache" / "gmpo"))


@contextlib.contextmanager
def kernels_off() -> Iterator[None]:
    """Inside, torch's operations run, in all threads: for comparing the two."""
    before, _Held.is_off = _Held.is_off, True
    try:
        yield
    finally:
        _Held.is_off = before


def _built() -> Build:
    wanted = os.environ.get("GMPO_KERNELS", "auto")
    if wanted not in ("auto", "on", "off"):
        raise ConfigError(f"GMPO_KERNELS is {wanted!r}; allowed are auto, on and off")
    if wanted == "off":
        return Build(library=None, said="off by GMPO_KERNELS")
    made = _compiled() if os.name == "posix" else Build(library=None, said="for POSIX systems only")
    if made.library is None and wanted == "on":
        raise ModelError(f"GMPO_KERNELS is on, but there are no compiled functions: {made.said}")
    return made


def _compiled() -> Build:
    import torch  # noqa: F401 - its OpenMP library must be there before the object that uses it

    wanted = os.environ.get("CC", "cc")
    compiler = shutil.which(wanted)
    if compiler is None:
        return Build(library=None, said=f"no C compiler ({wanted}) is installed")
    fault = ""
    for flags in _ATTEMPTS:
        try:
            path = _object_for(compiler, flags)
            # OSError too where a name that the object needs is in none of the loaded libraries.
            library = ctypes.CDLL(str(path))
        except (OSError, subprocess.SubprocessError) as error:
            fault = fault or _first_line(error)
            continue
        kind = "several threads" if "-fopenmp" in flags else "one thread"
        return Build(library=library, said=f"compiled for this processor, {kind}", file=path)
    return Build(library=None, said=f"{compiler} does not compile them: {fault}")


def _object_for(compiler: str, flags: Sequence[str]) -> Path:
    """The shared object of these flags, from the cache or made now."""
    digest = hashlib.sha256(_macros(compiler, flags))
    for source in sorted((*_SOURCES.glob("*.c"), *_SOURCES.glob("*.h"))):
        digest.update(source.read_bytes())
    digest.update(" ".join((platform.machine(), *flags)).encode())
    name = f"kernels-{digest.hexdigest()[:20]}.so"
    for folder in _folders():
        path = folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not _is_own(folder):
                continue
            if path.is_file():
                return path
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = _made(compiler, flags, Path(scratch))
                made.replace(path)  # whole or not at all, whoever else compiles it now
        except OSError:  # no right to write, no room, a file in the way: the next folder
            continue
        return path
    raise OSError(f"{' and '.join(map(str, _folders()))} cannot be written, or others may too")


def _macros(compiler: str, flags: Sequence[str]) -> bytes:
    """What the compiler defines with these flags: its version and this processor's instructions.

    A home folder may be shared by machines of which one lacks what another has.
    """
    command = [compiler, *flags, "-dM", "-E", "-x", "c", os.devnull]
    return subprocess.run(command, capture_output=True, check=True, timeout=_SECONDS).stdout


def _made(compiler: str, flags: Sequence[str], scratch: Path) -> Path:
    linked = ("-dynamiclib", "-undefined", "dynamic_lookup") if _is_mac() else ("-shared",)
    commands = (
        [compiler, *flags, "-c", str(_MAIN_SOURCE), "-o", str(scratch / "kernels.o")],
        [compiler, *linked, str(scratch / "kernels.o"), "-o", str(scratch / "kernels.so"), "-lm"],
    )
    for command in commands:
        subprocess.run(command, capture_output=True, check=True, timeout=_SECONDS, text=True)
    return scratch / "kernels.so"


def _is_mac() -> bool:
    return sys.platform == "darwin"


def _is_own(folder: Path) -> bool:
    """Whether nobody else can have put a file there: what lies in it is run."""
    return folder.stat().st_uid == os.getuid() and not folder.stat().st_mode & 0o022


def _folders() -> tuple[Path, ...]:
    """Where the object is looked for and put: the cache, else a folder of this user's own."""
    temporary = Path(tempfile.gettempdir()) / f"gmpo-kernels-{os.getuid()}"
    return cache_folder() / "kernels", temporary


def _first_line(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError) and error.stderr:
        text = error.stderr if isinstance(error.stderr, str) else error.stderr.decode()
        return text.strip().splitlines()[0]
    return str(error)
