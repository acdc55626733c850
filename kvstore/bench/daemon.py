"""A daemon that a benchmark starts for itself, in a folder that is removed afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

READY_PREFIX = "kvstored ready: "
_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 30.0


class DaemonFailed(RuntimeError):
    """The daemon did not start, or ended by itself; the message has the end of its log."""


@dataclass(frozen=True, slots=True)
class SpawnedDaemon:
    """A running daemon: its address, its process and its folder."""

    address: str
    pid: int
    folder: Path

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of its log."""
        return _tail(self.folder, lines)


@contextlib.contextmanager
def spawned(
    warm_bytes: int, cold_bytes: int, folder: Path | None = None, **settings: object
) -> Iterator[SpawnedDaemon]:
    """Run a daemon with this very interpreter until the block ends.

    Args:
        warm_bytes: size of its warm pool.
        cold_bytes: size of its cold tier; 0: none.
        folder: where its state is and stays; None: in a folder that is removed afterwards.
        settings: further keys of its configuration file.

    Raises:
        DaemonFailed: it was not ready within 30 s.
    """
    with _kept_or_temporary(folder) as folder:
        config = {
            "state_dir": str(folder / "state"),
            "socket": str(folder / "kv.sock"),
            "warm_bytes": warm_bytes,
            "cold_bytes": cold_bytes,
            "hot_device": "off",
            "drain_grace_s": 1,
            **settings,
        }
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in config.items()]
        (folder / "kvstored.toml").write_text("".join(lines), encoding="utf-8")
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "kvstore.cli.kvstored", "--config", str(folder / "kvstored.toml")],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        with process:
            try:
                yield SpawnedDaemon(_ready_address(process, folder), process.pid, folder)
            finally:
                _stop(process)


def _kept_or_temporary(folder: Path | None) -> contextlib.AbstractContextManager[Path]:
    if folder is not None:
        return contextlib.nullcontext(folder)
    return _temporary()


@contextlib.contextmanager
def _temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kvbench-") as name:
        yield Path(name)


def _ready_address(process: subprocess.Popen[bytes], folder: Path) -> str:
    assert process.stdout is not None
    received, deadline = b"", time.monotonic() + _START_TIMEOUT_S
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not received.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise DaemonFailed(f"the daemon was not ready after {_START_TIMEOUT_S:g} s:\n{_tail(folder)}")
            chunk = os.read(process.stdout.fileno(), 4096)
            if not chunk:
                raise DaemonFailed(f"the daemon ended instead of starting:\n{_tail(folder)}")
            received += chunk
    line = received.decode().splitlines()[-1]
    if not line.startswith(READY_PREFIX):
        raise DaemonFailed(f"the daemon said {line!r} where it should say that it is ready")
    return line.removeprefix(READY_PREFIX).strip()


def _stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()


def _tail(folder: Path, lines: int = 20) -> str:
    text = (folder / "log").read_text(encoding="utf-8", errors="replace")
    return "\n".join(text.splitlines()[-lines:])
