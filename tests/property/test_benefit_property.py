"""The length that is promised is the best there is, and a dearer recompute never gets a shorter one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.benefit import Cost, Price, Run, Span, WorkerCosts, worth
from kvstore.core.block import COLD, HOT, WARM

WAYS = st.tuples(st.sampled_from([HOT, WARM, COLD]), st.booleans())
SECONDS = st.floats(0.0, 1.0)
PER_BYTE = st.floats(0.0, 1e-6)
PRICES = st.builds(Price, st.builds(Cost, SECONDS, PER_BYTE), st.integers(0, 1 << 24), SECONDS)
SPANS = st.builds(Span, st.integers(0, 1 << 17), st.integers(1, 512), st.integers(1, 1 << 22))
WORKERS = st.builds(WorkerCosts, st.floats(0.0, 1e-2), st.floats(0.0, 1e-6), PER_BYTE)


def runs_of(ways: list[tuple[int, bool]]) -> list[Run]:
    """One run a block, then joined as the gate joins them."""
    runs: list[Run] = []
    for tier, loading in ways:
        loading = loading and tier != WARM
        if runs and (runs[-1].tier, runs[-1].loading) == (tier, loading):
            runs[-1] = runs[-1]._replace(blocks=runs[-1].blocks + 1)
        else:
            runs.append(Run(tier, 1, loading))
    return runs


def saved_s(runs: list[Run], span: Span, worker: WorkerCosts, prices: dict[int, Price], count: int) -> float:
    """Of the first `count` blocks, token by token and byte by byte as the words say it."""
    ways = [(run.tier, run.loading) for run in runs for _ in range(run.blocks)][:count]
    recompute_s = sum(
        worker.recompute_s + worker.recompute_s2 * token
        for token in range(span.first_token, span.first_token + count * span.block_tokens)
    )
    fetch_s = count * span.block_nbytes * worker.copy_s_per_byte
    for tier in {tier for tier, _ in ways} & prices.keys():
        price = prices[tier]
        asked = sum(span.block_nbytes for other, loading in ways if other == tier and not loading)
        fetch_s += price.cost.fixed_s + price.stalled_s + (price.queued_bytes + asked) * price.cost.s_per_byte
    return recompute_s - fetch_s


@given(st.lists(WAYS, max_size=12), SPANS, WORKERS, PRICES, PRICES)
def test_no_other_length_saves_more(
    ways: list[tuple[int, bool]], span: Span, worker: WorkerCosts, hot: Price, cold: Price
) -> None:
    runs, prices = runs_of(ways), {HOT: hot, COLD: cold}
    found = worth(runs, span, worker, prices)
    saved = [saved_s(runs, span, worker, prices, count) for count in range(len(ways) + 1)]
    assert saved[found] >= 0.0 or found == 0 or abs(saved[found]) < 1e-9
    assert max(saved) - saved[found] <= 1e-9 * (1 + max(map(abs, saved)))


@given(st.lists(WAYS, max_size=12), SPANS, WORKERS, PRICES, PRICES, st.floats(0.0, 1e-2), st.floats(0.0, 1e-6))
def test_a_dearer_recompute_never_gets_less(
    ways: list[tuple[int, bool]],
    span: Span,
    worker: WorkerCosts,
    hot: Price,
    cold: Price,
    more: float,
    more2: float,
) -> None:
    runs, prices = runs_of(ways), {HOT: hot, COLD: cold}
    dearer = worker._replace(recompute_s=worker.recompute_s + more, recompute_s2=worker.recompute_s2 + more2)
    assert worth(runs, span, dearer, prices) >= worth(runs, span, worker, prices)
