"""What a benchmark says of a daemon that does not start."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvstore.bench.daemon import DaemonFailed, spawned


def interpreter(folder: Path, script: str) -> str:
    """Something to run in the place of Python, whatever its arguments."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    return str(path)


def test_the_end_of_its_log_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, "echo no disk >&2; exit 1"))
    with pytest.raises(DaemonFailed, match=r"ended instead of starting:\nno disk"), spawned(1 << 20, 0):
        pytest.fail("it started")


def test_another_first_line_is_no_readiness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, "echo hello; exec sleep 60"))
    with pytest.raises(DaemonFailed, match="said 'hello'"), spawned(1 << 20, 0):
        pytest.fail("it started")
