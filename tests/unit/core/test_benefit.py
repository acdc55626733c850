"""What loads cost, as learned from samples; and how much of a prefix is worth that."""

from __future__ import annotations

import pytest

from kvstore.core.benefit import (
    ENOUGH,
    PROBE_BYTES,
    UNKNOWN,
    WINDOW,
    Cost,
    FetchCosts,
    Price,
    Run,
    Span,
    WorkerCosts,
    fit,
    worth,
)
from kvstore.core.block import COLD, HOT, WARM

MIB = 1 << 20
SPAN = Span(0, 16, MIB)
FIXED_S, RATE = 1e-3, 1e-9


class Clock:
    """Feeds batches of a medium of a given cost, one after the other."""

    def __init__(self) -> None:
        self.costs = FetchCosts((HOT, COLD))
        self.now_s = 0.0

    def load(self, nbytes: int, seconds: float | None = None) -> None:
        self.costs.began(COLD, self.now_s)
        self.now_s += FIXED_S + nbytes * RATE if seconds is None else seconds
        self.costs.came(COLD, nbytes, self.now_s)
        self.costs.ended(COLD)
        self.now_s += 1.0

    @property
    def cost(self) -> Cost:
        return self.costs.cost(COLD)


def test_nothing_is_believed_before_there_are_enough_samples() -> None:
    clock = Clock()
    for _ in range(ENOUGH - 1):
        clock.load(MIB)
        assert clock.cost == UNKNOWN
    clock.load(MIB)
    assert clock.cost != UNKNOWN
    assert clock.costs.cost(HOT) == UNKNOWN, "of another tier nothing is known"


def test_fixed_cost_and_rate_are_told_apart_where_sizes_differ() -> None:
    clock = Clock()
    for nbytes in (64 << 10, 8 * MIB, 256 << 10, MIB):
        clock.load(nbytes)
    assert clock.cost == pytest.approx((FIXED_S, RATE), rel=1e-6)


def test_equal_sizes_tell_no_fixed_cost_but_the_right_time_for_that_size() -> None:
    clock = Clock()
    for _ in range(ENOUGH):
        clock.load(MIB)
    assert clock.cost.fixed_s == 0.0
    assert MIB * clock.cost.s_per_byte == pytest.approx(FIXED_S + MIB * RATE)


def test_cost_is_never_negative() -> None:
    """Large loads that happened to be quick, and a line that would begin below nothing."""
    cost = fit([(1, MIB, 0.010), (1, 2 * MIB, 0.009), (1, 4 * MIB, 0.008), (1, 8 * MIB, 0.007)])
    assert cost.fixed_s >= 0.0
    assert cost.s_per_byte > 0.0
    steep = fit([(1, MIB, 0.001), (1, 2 * MIB, 0.004), (1, 4 * MIB, 0.016)])
    assert steep.fixed_s == 0.0
    assert steep.s_per_byte > 0.0


@pytest.mark.parametrize("position", range(WINDOW))
def test_a_stall_of_one_load_is_not_taken_for_a_fixed_cost(position: int) -> None:
    """Sizes differ, so that a line could bend towards it: then loads of any size would seem to cost the same."""
    samples = [(1, (1 + at % 4) * MIB, (1 + at % 4) * 0.010) for at in range(WINDOW)]
    samples[position] = (1, samples[position][1], 2.0)
    cost = fit(samples)
    for size in (MIB, 64 * MIB):
        assert 0.9 <= (cost.fixed_s + size * cost.s_per_byte) / (0.010 * size / MIB) <= 1.8


@pytest.mark.parametrize("position", range(ENOUGH))
def test_one_stall_does_not_count_for_more_than_a_few_loads(position: int) -> None:
    samples = [(1, MIB, 0.010)] * WINDOW
    samples[position] = (1, MIB, 2.0)
    for count in range(ENOUGH, WINDOW + 1):
        assert MIB * fit(samples[:count]).s_per_byte <= 0.0151, f"of {count}"
    assert MIB * fit(samples).s_per_byte < 0.0125


def test_a_medium_that_has_become_slow_is_believed() -> None:
    clock = Clock()
    for _ in range(WINDOW):
        clock.load(MIB, 0.010)
    for _ in range(WINDOW // 4 + 1):
        clock.load(MIB, 1.0)
    assert MIB * clock.cost.s_per_byte > 0.3


def test_a_medium_that_has_become_quick_is_believed_once_the_window_has_passed() -> None:
    clock = Clock()
    for seconds in (1.0, 0.010):
        for _ in range(WINDOW):
            clock.load(MIB, seconds)
    assert MIB * clock.cost.s_per_byte == pytest.approx(0.010)


def test_loads_at_the_same_time_share_the_medium() -> None:
    """Two loaders: each batch takes twice as long as it would alone, and the medium is no slower for that."""
    costs, now_s = FetchCosts((COLD,)), 0.0
    for _ in range(ENOUGH):
        costs.began(COLD, now_s)
        costs.began(COLD, now_s)
        for _ in range(8):
            now_s += 0.001
            costs.came(COLD, MIB, now_s)
        costs.ended(COLD)
        costs.ended(COLD)
        now_s += 5.0  # idle, which is nobody's fault
    assert MIB * costs.cost(COLD).s_per_byte == pytest.approx(0.001)


def test_what_brings_nothing_teaches_nothing() -> None:
    costs = FetchCosts((COLD,))
    for at in range(WINDOW):
        costs.began(COLD, float(at))
        costs.ended(COLD)
    assert costs.cost(COLD) == UNKNOWN


def test_a_probe_waits_for_idle_and_takes_a_tenth_of_the_time() -> None:
    clock = Clock()
    assert clock.costs.probe_bytes(COLD, 0.0) == PROBE_BYTES
    clock.costs.began(COLD, 0.0)
    assert clock.costs.probe_bytes(COLD, 0.0) == 0, "something is under way"
    clock.costs.came(COLD, MIB, 0.5)
    clock.costs.ended(COLD)
    assert clock.costs.probe_bytes(COLD, 4.9) == 0
    assert clock.costs.probe_bytes(COLD, 5.1) == PROBE_BYTES
    clock.now_s = 10.0
    for _ in range(WINDOW):
        clock.load(MIB, 1.0)
    assert clock.costs.probe_bytes(COLD, clock.now_s + 20.0) == pytest.approx(MIB / 10, rel=0.01), "0.1 s of it"


def test_a_hang_does_not_put_the_next_probe_off_for_minutes() -> None:
    clock = Clock()
    clock.load(MIB, 100.0)
    assert clock.costs.probe_bytes(COLD, clock.now_s + 10.0) > 0


def test_a_stall_is_seen_while_it_lasts() -> None:
    costs = FetchCosts((COLD,))
    assert costs.stalled_s(COLD, 7.0) == 0.0
    costs.began(COLD, 10.0)
    assert costs.stalled_s(COLD, 12.0) == 2.0
    costs.came(COLD, MIB, 13.0)
    assert costs.stalled_s(COLD, 13.5) == 0.5
    costs.ended(COLD)
    assert costs.stalled_s(COLD, 99.0) == 0.0


# -- how much is worth it -------------------------------------------------------------------------------------


def prices(cold: Cost = UNKNOWN, hot: Cost = UNKNOWN, queued: int = 0, stalled_s: float = 0.0) -> dict[int, Price]:
    return {HOT: Price(hot), COLD: Price(cold, queued, stalled_s)}


TEN_MS_A_BLOCK = Cost(0.0, 0.010 / MIB)


@pytest.mark.parametrize(("token_s", "expected"), [(0.5e-3, 0), (0.7e-3, 8)])
def test_slow_blocks_are_promised_if_recomputing_takes_longer(token_s: float, expected: int) -> None:
    """16 tokens a block: 8 ms against 10, and 11.2 against 10."""
    assert worth([Run(COLD, 8)], SPAN, WorkerCosts(token_s), prices(TEN_MS_A_BLOCK)) == expected


def test_a_fixed_cost_is_worth_it_for_long_prefixes_only() -> None:
    cost, worker = Cost(0.1, 0.0), WorkerCosts(1e-3)
    assert worth([Run(COLD, 6)], SPAN, worker, prices(cost)) == 0
    assert worth([Run(COLD, 7)], SPAN, worker, prices(cost)) == 7


def test_the_warm_head_is_promised_and_the_slow_tail_is_not() -> None:
    assert worth([Run(WARM, 3), Run(COLD, 5)], SPAN, WorkerCosts(1e-4), prices(TEN_MS_A_BLOCK)) == 3


def test_a_few_slow_blocks_are_worth_the_warm_ones_behind_them() -> None:
    runs = [Run(COLD, 1), Run(WARM, 50), Run(COLD, 50)]
    assert worth(runs, SPAN, WorkerCosts(1e-4), prices(TEN_MS_A_BLOCK)) == 51


def test_late_tokens_are_dearer() -> None:
    """The same blocks are worth nothing at the start of a prompt and much at its end."""
    worker = WorkerCosts(0.0, 1e-7)
    assert worth([Run(COLD, 8)], SPAN, worker, prices(TEN_MS_A_BLOCK)) == 0
    assert worth([Run(COLD, 8)], SPAN._replace(first_token=10_000), worker, prices(TEN_MS_A_BLOCK)) == 8


def test_a_queue_and_a_stall_make_a_fetch_dearer() -> None:
    worker, runs = WorkerCosts(1e-3), [Run(COLD, 8)]  # 128 ms against 80
    assert worth(runs, SPAN, worker, prices(TEN_MS_A_BLOCK, queued=4 * MIB)) == 8
    assert worth(runs, SPAN, worker, prices(TEN_MS_A_BLOCK, queued=5 * MIB)) == 0
    assert worth(runs, SPAN, worker, prices(TEN_MS_A_BLOCK, stalled_s=0.047)) == 8
    assert worth(runs, SPAN, worker, prices(TEN_MS_A_BLOCK, stalled_s=0.049)) == 0


def test_what_is_on_its_way_is_paid_for_by_the_queue() -> None:
    runs = [Run(COLD, 8, loading=True)]
    assert worth(runs, SPAN, WorkerCosts(0.7e-3), prices(TEN_MS_A_BLOCK, queued=8 * MIB)) == 8
    assert worth(runs, SPAN, WorkerCosts(0.6e-3), prices(TEN_MS_A_BLOCK, queued=8 * MIB)) == 0


def test_a_worker_that_copies_slowly_gets_less() -> None:
    worker = WorkerCosts(0.5e-3)  # 8 ms a block
    assert worth([Run(WARM, 4)], SPAN, worker, prices()) == 4
    assert worth([Run(WARM, 4)], SPAN, worker._replace(copy_s_per_byte=0.009 / MIB), prices()) == 0


def test_each_tier_has_its_own_price() -> None:
    runs = [Run(HOT, 4), Run(COLD, 4)]
    known = prices(cold=TEN_MS_A_BLOCK, hot=Cost(0.0, 0.001 / MIB))
    assert worth(runs, SPAN, WorkerCosts(0.05e-3), known) == 0
    assert worth(runs, SPAN, WorkerCosts(0.1e-3), known) == 4
    assert worth(runs, SPAN, WorkerCosts(1e-3), known) == 8
