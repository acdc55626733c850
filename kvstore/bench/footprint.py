"""What it costs to have it: an idle daemon, importing the client, kvctl --help."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

from kvstore.bench.figures import Result
from kvstore.bench.scale import Scale
from kvstore.config import child_environment

_TIMEOUT_S = 60.0
_TIMED_IMPORT = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"


def idle(name: str, pid: int, scale: Scale) -> Result:
    """CPU and memory of a daemon that nobody uses, with all its processes, without the pool."""
    main = psutil.Process(pid)
    processes = [main, *main.children(recursive=True)]
    before, started = _cpu_seconds(processes), time.monotonic()
    time.sleep(scale.idle_s)
    busy_s, span_s = _cpu_seconds(processes) - before, time.monotonic() - started
    figures = {
        "cpu_percent": round(100 * busy_s / span_s, 3),
        "rss_mb": round(sum(_private_rss_bytes(process.pid) for process in processes) / 1e6, 1),
        "processes": len(processes),
        "seconds": round(span_s, 2),
    }
    return Result(name, figures)


def import_ratio(name: str, scale: Scale) -> Result:
    """Importing the client against importing grpc alone, each in fresh processes, in turn."""
    taken: dict[str, list[float]] = {"kvstore_client": [], "grpc": []}
    for counted in (False, *[True] * scale.processes):  # the first pair warms the page cache
        for module, seconds in taken.items():
            value = float(_output([sys.executable, "-c", _TIMED_IMPORT.format(module)]))
            if counted:
                seconds.append(value)
    ours, theirs = (statistics.median(seconds) for seconds in taken.values())
    return Result(name, {"ratio": round(ours / theirs, 3), "client_s": round(ours, 4), "grpc_s": round(theirs, 4)})


def kvctl_help(name: str, scale: Scale) -> Result:
    """`kvctl --help` from the start of the process to its end."""
    taken_s = []
    for counted in (False, *[True] * scale.processes):
        started = time.perf_counter()
        _output([sys.executable, "-m", "kvstore.cli.kvctl", "--help"])
        if counted:
            taken_s.append(time.perf_counter() - started)
    return Result(name, {"seconds": round(statistics.median(taken_s), 4), "rounds": len(taken_s)})


def _output(command: list[str]) -> str:
    # Compiled files are kept, as they are where a package is installed.
    environment = child_environment({"PYTHONDONTWRITEBYTECODE": ""})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    return done.stdout


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return float(sum(found.user + found.system for found in times))


def _private_rss_bytes(pid: int) -> int:
    """Resident bytes without shared memory: the pool and staging are memfds, which the kernel counts apart."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return (int(fields["VmRSS"].split()[0]) - int(fields["RssShmem"].split()[0])) * 1024
