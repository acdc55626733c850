"""What an import costs, as what it drags in: counted in modules and never in seconds.

A worker imports kvstore_client into its own process, and the daemon's main process leaves torch and lmdb to agents.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from source_tree import ROOT

HEAVY = ("torch", "lmdb", "zstandard", "psutil", "numpy", "numba", "transformers", "matplotlib")


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in sys.modules after a statement in a fresh interpreter."""
    program = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import kvstore_client", {*HEAVY, "rich", "click", "prometheus_client"}),
        ("import kvstore.protocol.keys, kvstore.protocol.convert", {*HEAVY, "grpc", "xxhash"}),
        ("import kvstore.app", {*HEAVY, "kvstore_client"} - {"numpy", "psutil"}),
        ("import kvstore.cli.kvstored", {*HEAVY, "kvstore_client"} - {"numpy", "psutil"}),
        ("import kvstore.cli.kvctl", set(HEAVY)),
    ],
    ids=lambda value: value.removeprefix("import ") if isinstance(value, str) else "",
)
def test_import_is_light(statement: str, forbidden: set[str]) -> None:
    assert not loaded_by(statement) & forbidden


def test_the_measurement_sees_a_heavy_import() -> None:
    assert "numpy" in loaded_by("import numpy")
