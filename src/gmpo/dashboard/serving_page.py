"""The page's server: a Streamlit process beside this one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import httpx2

from gmpo.dashboard.settings import VARIABLE, DashboardSettings
from gmpo.errors import ConfigError, DashboardError, DependencyError

__all__ = ["dashboard_process", "free_port"]

_PAGE = Path(__file__).with_name("page.py")
_START_SECONDS = 120.0
_END_SECONDS = 10.0


def free_port(host: str, port: int) -> int:
    """The port, or any free one for 0.

    Raises:
        ConfigError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As the server itself binds: a port whose connections are just ending is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConfigError(
            f"the dashboard cannot listen at {host}:{port}: {error.strerror or error}; choose "
            "another address or port"
        ) from None


@contextmanager
def dashboard_process(
    settings: DashboardSettings, *, host: str, port: int
) -> Iterator[subprocess.Popen[bytes]]:
    """The page's server while the block runs; it answers already when the block begins.

    Raises:
        DependencyError: the extra is not installed.
        DashboardError: the server did not start.
    """
    for package in ("streamlit", "plotly"):
        if find_spec(package) is None:
            raise DependencyError(
                f"gmpo dashboard needs {package}; install it with pip install 'gmpo[dashboard]'"
            )
    process = subprocess.Popen(
        _command(host, port),
        env={**os.environ, VARIABLE: settings.as_json()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        _await_answer(process, host, port)
        yield process
    finally:
        _end(process)


def _command(host: str, port: int) -> list[str]:
    options = {
        "server.address": host,
        "server.port": port,
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "server.runOnSave": "false",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "minimal",
        "client.showErrorDetails": "none",
        "global.developmentMode": "false",
        "logger.level": "warning",
    }
    return [
        *(sys.executable, "-m", "streamlit", "run", str(_PAGE)),
        *(f"--{name}={value}" for name, value in options.items()),
    ]


def _await_answer(process: subprocess.Popen[bytes], host: str, port: int) -> None:
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}/_stcore/health"
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DashboardError(
                f"the dashboard ended at its start with code {process.returncode}; its own words "
                "are above"
            )
        try:
            if httpx2.get(url, timeout=5, trust_env=False).is_success:
                return
        except httpx2.TransportError:
            time.sleep(0.1)  # it does not listen yet
    raise DashboardError(f"the dashboard did not answer at {url} in {_START_SECONDS:.0f} seconds")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
