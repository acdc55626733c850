"""The main job on real input: a second worker reuses a prefix from RAM, SSD and the hot stand-in.

Starts a daemon of its own in a temporary directory, runs worker processes against it, checks that every answer
equals the live cache's bit for bit, and prints a table, a plot and `kvctl status`. Ends every process it starts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
TEXT = HERE.parent.parent / "LICENSE"
READY_TIMEOUT_S = 60.0
WORKER_TIMEOUT_S = 200.0
STOP_TIMEOUT_S = 60.0


@dataclass
class Arm:
    """One way to a first token."""

    letter: str
    title: str
    mode: str
    report: dict[str, Any] = field(default_factory=dict)
    logits: np.ndarray | None = None


class Daemon:
    """A kvstored of the demo's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"unix:{folder}/kvstore.sock"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it, and wait until it says that it is ready."""
        command = [sys.executable, "-m", "kvstore.cli.kvstored", "--state-dir", str(self.folder / "state")]
        command += ["--socket", f"{self.folder}/kvstore.sock", "--warm-bytes", "512MiB", "--cold-bytes", "1GiB"]
        command += ["--hot-device", "cpu", "--hot-bytes", "256MiB", "--log-level", "warning"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if "ready" not in line:
            raise SystemExit(f"the daemon did not start (exit {self._process.wait(STOP_TIMEOUT_S)}); its log is above")

    def stop(self) -> None:
        """SIGTERM: it drains warm to cold and exits."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def kvctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run kvctl against it."""
        command = [sys.executable, "-m", "kvstore.cli.kvctl", "--address", self.address, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    def tiers(self) -> dict[str, dict[str, Any]]:
        """`kvctl stats --json`, by tier."""
        answer = self.kvctl("stats", "--json")
        if answer.returncode:
            raise SystemExit(answer.stderr)
        tiers: dict[str, dict[str, Any]] = json.loads(answer.stdout)["tiers"]
        return tiers


def run_worker(arm: Arm, daemon: Daemon, folder: Path) -> None:
    """Run one worker process to its end and take its report."""
    result = folder / f"{arm.letter}.json"
    command = [sys.executable, str(HERE / "worker.py"), arm.mode, daemon.address, str(TEXT), str(result)]
    done = subprocess.run(command, timeout=WORKER_TIMEOUT_S, check=False)
    if done.returncode:
        raise SystemExit(f"the worker of ({arm.letter}) failed")
    arm.report = json.loads(result.read_text())
    arm.logits = np.load(result.with_suffix(".npy"))


def fill_hot(daemon: Daemon, folder: Path) -> None:
    """Blocks go hot after their second use; then nothing but hot is left above cold."""
    run_worker(Arm("e-warm-up", "", "fetch"), daemon, folder)
    blocks = daemon.tiers()["warm"]["blocks"]
    deadline = time.monotonic() + READY_TIMEOUT_S
    while daemon.tiers()["hot"]["blocks"] < blocks:
        if time.monotonic() > deadline:
            raise SystemExit("the hot tier did not fill in time")
        time.sleep(0.2)
    daemon.kvctl("evict", "warm", "512MiB")


def served_by(daemon: Daemon, tier: str, before: dict[str, dict[str, Any]]) -> int:
    """Blocks that `tier` has served since `before`."""
    return int(daemon.tiers()[tier]["hits"] - before[tier]["hits"])


def show(console: Console, arms: list[Arm], served: dict[str, str]) -> bool:
    """Print the table; returns whether every logit that must agree does."""
    reference = next(arm for arm in arms if arm.mode == "live")
    base = next(arm for arm in arms if arm.mode == "recompute").report["median_s"]
    table = Table(title="Time to first token in seconds")
    # The first question of a worker is served by the tier in question; what it loaded is in warm for the others.
    columns = (
        "",
        "way",
        "first question",
        "against (a)",
        "others, median",
        "fetched",
        "served by",
        "logits = live cache",
    )
    for column in columns:
        table.add_column(column)
    good = True
    for arm in arms:
        exact = "-"
        if arm.mode == "fetch":
            equal = np.array_equal(arm.logits, reference.logits)
            good &= equal
            exact = "bit for bit" if equal else "NO"
        report = arm.report
        table.add_row(
            f"({arm.letter})", arm.title, f"{report['ttft_s'][0]:.3f}", f"{base / report['ttft_s'][0]:.1f}x",
            f"{statistics.median(report['ttft_s'][1:]):.3f}", f"{min(report['fetched_tokens'], default=0)} tokens",
            served.get(arm.letter, ""), exact,
        )  # fmt: skip
    console.print(table)
    tokens, parameters = reference.report["prompt_tokens"], reference.report["parameters"]
    console.print(
        f"{parameters / 1e6:.1f}M parameters, prompts of {min(tokens)} to {max(tokens)} tokens, "
        f"{len(tokens)} questions on one prefix, float32, two threads."
    )
    return good


def plot(arms: list[Arm], path: Path) -> None:
    """A bar for every way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    names = [f"({arm.letter}) {arm.title}" for arm in arms]
    bars = axes.barh(names, [arm.report["ttft_s"][0] for arm in arms], color=["#999", "#999", "#2a7", "#27a", "#a52"])
    axes.bar_label(bars, fmt="%.3f s", padding=4)
    axes.set_xscale("log")
    axes.set_xlim(right=3 * max(arm.report["ttft_s"][0] for arm in arms))
    axes.invert_yaxis()
    axes.set_xlabel("time to first token of the first question, seconds (log scale)")
    figure.savefig(path, dpi=120)


def demo(console: Console, folder: Path, plot_path: Path) -> bool:
    """The whole run; returns whether everything that must agree does."""
    arms = [
        Arm("a", "no KV cache", "recompute"),
        Arm("b", "the model's own cache, cold prompt", "live"),
        Arm("c", "second worker, prefix from warm (RAM)", "fetch"),
        Arm("d", "after a daemon restart, from cold (SSD)", "fetch"),
        Arm("e", "from the hot tier's host stand-in (no GPU)", "fetch"),
    ]
    served: dict[str, str] = {}
    daemon = Daemon(folder)
    daemon.start()
    try:
        for arm in arms:
            console.print(f"({arm.letter}) {arm.title} …")
            if arm.letter == "d":
                daemon.stop()
                daemon.start()
            if arm.letter == "e":
                fill_hot(daemon, folder)
            before = daemon.tiers()
            run_worker(arm, daemon, folder)
            if arm.mode == "fetch":
                counts = {tier: served_by(daemon, tier, before) for tier in ("hot", "warm", "cold")}
                served[arm.letter] = " + ".join(f"{count} {tier}" for tier, count in counts.items() if count)
        good = show(console, arms, served)
        plot(arms, plot_path)
        console.print(f"plot: {plot_path}")
        print(daemon.kvctl("status").stdout)
    finally:
        daemon.stop()
    return good


def main() -> int:
    """Exit 0 if every fetched prefix gave the live cache's logits bit for bit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, default=Path("demo.png"), help="where the plot goes")
    arguments = parser.parse_args()
    console = Console(width=140)
    folder = Path(tempfile.mkdtemp(prefix="kvtier-demo-"))
    try:
        good = demo(console, folder, arguments.plot)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not good:
        console.print("[red]Some logits differ from the live cache's.[/red]")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
