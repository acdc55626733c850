"""`kvctl bench gpu` with host memory for a device: that everything runs, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys

from kvstore.bench.figures import SUITES


def test_every_line_is_measured_and_every_byte_right() -> None:
    command = [sys.executable, "-m", "kvstore.cli.kvctl", "bench", "gpu", "--spawn", "--quick", "--json"]
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["failures"] == {}
    assert [result["name"] for result in report["results"]] == list(SUITES["gpu"])
    assert {result["device"] for result in report["results"] if "device" in result} == {"cpu"}


def test_without_a_device_it_says_so_and_fails() -> None:
    command = [sys.executable, "-m", "kvstore.cli.kvctl", "bench", "gpu_scatter", "--spawn", "--quick", "--json"]
    done = subprocess.run([*command, "--device", "cuda:99"], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 1
    assert "gpu_scatter" in json.loads(done.stdout)["failures"]
