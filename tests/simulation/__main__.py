"""python -m tests.simulation --seed N --steps M: replays a seed exactly; --seeds A..B runs many."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import click

from simulated.simulation import CHECK_EVERY, Report, Simulation


def main() -> int:
    """Exit status 1 where a seed failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="one seed")
    parser.add_argument("--seeds", default="", metavar="A..B", help="all from A to B")
    parser.add_argument("--steps", type=int, default=10_000, help="steps a seed")
    parser.add_argument("--seconds", type=float, default=0.0, help="begin no further seed after so long; 0: all")
    parser.add_argument("--check-every", type=int, default=CHECK_EVERY, help="steps between two full checks")
    parser.add_argument("--counts", action="store_true", help="print what happened, by kind")
    options = parser.parse_args()
    first, _, last = options.seeds.partition("..")
    seeds = range(int(first), int(last or first) + 1) if first else [options.seed or 0]
    total, failed, began_s = Counter[str](), list[Report](), time.monotonic()
    steps = done = 0
    for seed in seeds:
        if options.seconds and time.monotonic() - began_s > options.seconds:
            break
        report = Simulation(seed, options.check_every).run(options.steps)
        total += report.counts
        steps, done = steps + report.steps, done + 1
        if report.failure or len(seeds) == 1:
            click.echo(report)
        if report.failure:
            failed.append(report)
    took_s = time.monotonic() - began_s
    if options.counts or len(seeds) > 1:
        for what, count in sorted(total.items()):
            click.echo(f"{count:>10} {what}")
    click.echo(f"{done} seeds, {steps} steps in {took_s:.1f} s ({steps / took_s:.0f} a second), {len(failed)} failed")
    wrong = sum("WRONG BYTES" in report.failure for report in failed)
    click.echo(f"wrong bytes: {wrong}; other failures: {len(failed) - wrong}; seeds: {[r.seed for r in failed]}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
