"""Checks and measures the hot tier on this machine's CUDA device: gpu_check.py [--wheels DIR] [--device cuda:N].

For a machine without a network, whose Python already has torch, grpcio and numpy: what else is missing comes as wheels
from DIR, into build/gpu-check and nowhere else. Needs no root, leaves the device as it found it, and takes less than
eight minutes. Prints the table last; the whole report is build/gpu-check/report.json.

Exit codes: 0 all passed and measured, 1 something did not, 2 this machine cannot run it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu-check"
SITE = BUILD / "site"
TESTS_S = 220
BENCH_S = 220
# By the name to import, how the package is called. lmdb is not needed: there is no cold tier here.
NEEDED = {
    "torch": "torch",
    "numpy": "numpy",
    "grpc": "grpcio",
    "google.protobuf": "protobuf",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "xxhash": "xxhash",
    "zstandard": "zstandard",
    "psutil": "psutil",
    "click": "click",
    "rich": "rich",
    "prometheus_client": "prometheus-client",
}
FOR_DEVICE = {"cuda.bindings": "cuda-bindings"}
FOR_TESTS = {"pytest": "pytest", "pytest_timeout": "pytest-timeout", "hypothesis": "hypothesis"}


def main() -> int:
    """Prepare, test, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder with wheels of what this Python lacks")
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu to see whether all of it runs")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run? Not for figures")
    options = parser.parse_args()
    prepare(options.wheels)
    lacking = missing(NEEDED | (FOR_DEVICE if options.device != "cpu" else {}))
    if lacking:
        print(f"this Python lacks {', '.join(lacking)}; put their wheels into a folder: make gpu-check WHEELS=folder")
        return 2
    reason = "" if options.device == "cpu" else no_device(options.device)
    if reason:
        print(f"there is no {options.device} to check: {reason}")
        return 2
    tests = run_tests() if options.device != "cpu" else "left out"
    report = run_bench(options.device, quick=options.quick)
    (BUILD / "report.json").write_text(json.dumps({"tests": tests, **report}, indent=2) + "\n", encoding="utf-8")
    print_table(report, tests)
    return 0 if tests in ("passed", "left out") and report["results"] and not report["failures"] else 1


def prepare(wheels: Path | None) -> None:
    """A folder on the path with what the wheels have and this project's own name and version."""
    SITE.mkdir(parents=True, exist_ok=True)
    if wheels is not None:
        found = sorted(map(str, wheels.glob("*.whl")))
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
        subprocess.run([*install, "--target", str(SITE), *found], check=True, timeout=300)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    info = SITE / f"kvtier-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kvtier\nVersion: {version}\n", encoding="utf-8")
    for folder in (ROOT / "client", ROOT, SITE):
        sys.path.insert(0, str(folder))


def environment() -> dict[str, str]:
    """Of everything that is started."""
    path = os.pathsep.join([str(SITE), str(ROOT), str(ROOT / "client")])
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def missing(packages: dict[str, str]) -> list[str]:
    """Packages that cannot be imported, by the name they are installed under."""
    return [package for module, package in packages.items() if not is_there(module)]


def is_there(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def no_device(name: str) -> str:
    """Why the device cannot be used; empty where it can. Asked in another process, which leaves nothing behind."""
    program = (
        "import sys; from kvstore.tiers.cuda import CudaDevice; d = CudaDevice(sys.argv[1]); "
        "print(d.name, d.label, '%.1f of %.1f GiB free' % tuple(n / 2**30 for n in d.memory_bytes()))"
    )
    command = [sys.executable, "-c", program, name]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100, check=False
    )
    print(done.stdout, end="", flush=True)
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def run_tests() -> str:
    """tests/gpu; what became of it in a word or two."""
    lacking = missing(FOR_TESTS)
    if lacking:
        print(f"tests/gpu left out: this Python lacks {', '.join(lacking)}")
        return "left out"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-W", "default", "-p", "no:cacheprovider"]
    try:
        code = subprocess.run(command, cwd=ROOT, env=environment(), timeout=TESTS_S, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"not done after {TESTS_S} s"
    return "passed" if code == 0 else f"failed with {code}"


def run_bench(device: str, *, quick: bool) -> dict[str, Any]:
    """The report of kvctl bench gpu."""
    command = [sys.executable, "-m", "kvstore.cli.kvctl", "bench", "gpu", "--spawn", "--json", "--device", device]
    command += ["--quick"] if quick else []
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, timeout=BENCH_S, check=False
        )
        report: dict[str, Any] = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        return {"results": [], "failures": {"gpu": f"{type(error).__name__}: {error}"}, "environment": {}}
    return report


def print_table(report: dict[str, Any], tests: str) -> None:
    """One line for each result, as docs/benchmarks has them."""
    place = report["environment"]
    print(f"\n{place.get('cores')} cores of {place.get('cpu')}, Python {place.get('python')}, {place.get('packages')}")
    print(f"tests/gpu: {tests}\n\n| name | figures |\n|---|---|")
    for result in report["results"]:
        hidden = {"name", "judged", "must", "goal", "ok"}
        shown = {key: value for key, value in result.items() if key not in hidden}
        figures = [
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
        ]
        print(f"| {result['name']} | {', '.join(figures)} |")
    for name, why in report["failures"].items():
        print(f"| {name} | not measured: {why} |")


if __name__ == "__main__":
    sys.exit(main())
