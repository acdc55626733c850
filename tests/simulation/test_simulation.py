"""A fixed set of seeds of the simulated daemon; `make simulate` runs others (docs/reliability.md)."""

from __future__ import annotations

from collections import Counter

import pytest

from simulated.simulation import Report, Simulation

STEPS = 8000
BATCHES = [range(first, first + 4) for first in (1, 5, 9, 13)]  # 128,000 steps, and the rests between them

REACHED = (
    "loads", "saved to cold", "saved to hot", "blocks read", "blocks not readable", "leases expired", "adopted",
    "scribbles", "times of rest", "acquire", "acquire_two", "prefetch", "delete", "clear", "end_session", "go_silent",
    "put STORED", "put EXISTS", "put CLEARED", "put CHECKSUM", "put DEADLINE", "put NO_ROOM", "put NO_PARENT",
    "put DRAINING", "wait: all", "wait: lost", "wait: not yet", "operator: cool", "operator: evict", "operator: flush",
    "operator: verify", "operator: compact", "operator: drain", "operator: restart", "accident: kill agent",
    "accident: hang agent", "accident: kill daemon", "accident: full disk", "accident: slow medium",
    "accident: damage", "accident: lose record", "accident: memory", "accident: catalogue", "accident: descriptors",
)  # fmt: skip
_seen: dict[int, Report] = {}


@pytest.mark.parametrize("seeds", BATCHES, ids=lambda seeds: f"seeds {seeds[0]} to {seeds[-1]}")
def test_everything_holds(seeds: range) -> None:
    for seed in seeds:
        _seen[seed] = report = Simulation(seed).run(STEPS)
        assert not report.failure, str(report)
        assert report.steps >= STEPS


def test_these_seeds_reach_what_they_are_for() -> None:
    reports = [_seen.get(seed) or Simulation(seed).run(STEPS) for seeds in BATCHES for seed in seeds]
    total = sum((report.counts for report in reports), Counter[str]())
    assert [what for what in REACHED if not total[what]] == []
    assert any("agent late" in what for what in total)


def test_a_seed_runs_the_same_again() -> None:
    first, second = (Simulation(77).run(3000) for _ in range(2))
    assert (first.steps, first.counts, first.lines) == (second.steps, second.counts, second.lines)


def test_a_failure_says_how_to_repeat_it() -> None:
    report = Report(5, 100, 50, Counter(), "WRONG BYTES", ("put", "acquire"))
    assert "python -m tests.simulation --seed 5 --steps 100" in str(report) and "acquire" in str(report)
