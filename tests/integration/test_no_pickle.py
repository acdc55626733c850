"""Defect 12 of peers, pickle over a socket: nothing in the daemon, its agents or a worker ever unpickles."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from pickle_audit import PickleAudit

WAIT_S = 60
WORKER = Path(__file__).parents[1] / "helpers" / "audited_worker.py"
PROCESSES = 2 * (1 + 2 + 1)  # twice: the daemon, a cold and a hot agent, a worker


@contextlib.contextmanager
def daemon(folder: Path, audit: PickleAudit) -> Iterator[str]:
    """A watched daemon; it is stopped in order, and so saves what it holds."""
    socket = folder / "k.sock"
    command = [
        sys.executable,
        "-m",
        "kvstore.cli.kvstored",
        "--state-dir",
        str(folder / "state"),
        "--socket",
        str(socket),
    ]
    command += ["--warm-bytes", "64MiB", "--cold-bytes", "64MiB", "--hot-device", "cpu", "--hot-bytes", "64MiB"]
    with subprocess.Popen(command, env=audit.environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert "ready" in process.stdout.readline()
            yield f"unix:{socket}"
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == 0
        finally:
            process.kill()


def work(address: str, job: str, audit: PickleAudit) -> None:
    command = [sys.executable, str(WORKER), address, job]
    subprocess.run(command, env=audit.environment(), check=True, timeout=WAIT_S)


@pytest.mark.timeout(300)
def test_nothing_unpickles_from_the_first_put_to_a_get_after_a_restart(pickle_audit: PickleAudit) -> None:
    with TemporaryDirectory(prefix="kvaudit-") as name:  # short enough for a socket's path
        with daemon(Path(name), pickle_audit) as address:
            work(address, "put", pickle_audit)
        with daemon(Path(name), pickle_audit) as address:
            work(address, "get", pickle_audit)
    pickle_audit.check(PROCESSES)
