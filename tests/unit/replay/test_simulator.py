"""The simulator: it is the core that decides, and every copy is counted."""

from __future__ import annotations

import pytest

from kvstore.core.adaptive import Adaptive
from kvstore.core.leaf_lru import LeafLru
from kvstore.replay.optimum import optimum
from kvstore.replay.simulator import Simulator
from kvstore.replay.trace import Chain, Trace, made
from kvstore.replay.workloads import workload


def trace_of(*prompts: str, tokens: int = 0) -> Trace:
    """Each letter is a block; a dot at the end makes the last one partial."""
    chain, trace = Chain(), Trace("test", 16)
    for number, prompt in enumerate(prompts):
        ids = list(prompt.rstrip("."))
        trace.requests.append(made(chain, float(number), list(ids), 16 * len(ids) - prompt.count("."), 16))
    return trace


def found(trace: Trace, **blocks: int) -> list[int]:
    simulator = Simulator(blocks, LeafLru)
    return [simulator.request(request) for request in trace.requests]


def test_hits_are_whole_prefixes() -> None:
    assert found(trace_of("abc", "abd", "abc", "xbc"), warm=10) == [0, 2, 3, 0]


def test_capacity_is_exact() -> None:
    assert found(trace_of("a", "b", "c", "a"), warm=3)[-1] == 1
    assert found(trace_of("a", "b", "c", "a"), warm=2)[-1] == 0
    assert found(trace_of("abcdef", "abcdef"), warm=4) == [0, 4]


def test_a_partial_block_is_not_stored_and_counts_in_the_denominator() -> None:
    simulator = Simulator({"warm": 10}, LeafLru)
    counts = simulator.run(trace_of("abc.", "abc."))
    assert (counts.references, sum(counts.hits.values()), counts.stored) == (6, 2, 2)
    assert counts.prefix_hit == pytest.approx(2 / 3)


def test_tokens_that_need_no_prefill() -> None:
    counts = Simulator({"warm": 10}, LeafLru).run(trace_of("abc.", "abc.", "ab"))
    assert (counts.tokens, counts.tokens_saved) == (47 + 47 + 32, 64)


def test_moves_between_tiers_are_counted() -> None:
    simulator = Simulator({"warm": 20, "cold": 100}, LeafLru)
    counts = simulator.run(trace_of(*(letter * 2 for letter in "abcdefghijklmnopqrstuvwxyzabcdefghij")))
    assert counts.hits["cold"] > 0
    assert counts.moved["cold", "warm"] == counts.hits["cold"]
    assert counts.moved["warm", "cold"] == simulator.cache.residency.counts[4].writes


def test_what_is_read_often_is_promoted_and_counted_as_hot() -> None:
    counts = Simulator({"hot": 2, "warm": 4}, LeafLru).run(trace_of("ab", "ab", "ab", "ab"))
    assert counts.hits == {"hot": 2, "warm": 4, "cold": 0}
    assert counts.moved == {("warm", "hot"): 2}


def test_what_an_exclusive_tier_would_write_is_every_leaving() -> None:
    """26 blocks in turn through a warm tier of 20: the real tier writes each about once, the other at every turn."""
    counts = Simulator({"warm": 20, "cold": 100}, LeafLru).run(trace_of(*"abcdefghijklmnopqrstuvwxyz" * 4))
    assert counts.hits["cold"] > 50
    assert counts.left_warm + 20 == counts.stored + counts.moved["cold", "warm"]
    assert counts.left_warm > 2 * counts.moved["warm", "cold"]


def test_a_block_that_is_refused_never_leaves() -> None:
    counts = Simulator({"warm": 240}, Adaptive).run(workload("loops"))
    assert counts.refused > 0
    assert counts.left_warm + 240 == counts.stored


def test_a_request_without_blocks_is_a_request() -> None:
    assert found(trace_of("a", "", "a"), warm=1) == [0, 0, 1]


@pytest.mark.parametrize("blocks", [{}, {"warm": 0}, {"cold": 3}, {"warm": 1, "lukewarm": 1}, {"warm": 1, "hot": -1}])
def test_tiers_that_cannot_be(blocks: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="warm=N"):
        Simulator(blocks, LeafLru)


def test_the_optimum_knows_the_future() -> None:
    trace = trace_of("a", "b", "c", "a", "b", "c", "a")
    assert optimum(trace, 1) == 2  # a is kept from end to end
    assert optimum(trace, 2) == 3 + 0
    assert optimum(trace, 3) == 4
    assert found(trace, warm=2) == [0] * 7


def test_the_optimum_keeps_the_beginning_of_what_does_not_fit() -> None:
    assert optimum(trace_of("abcdef", "abcdef"), 4) == 4


def test_the_optimum_stores_no_partial_block() -> None:
    assert optimum(trace_of("ab.", "ab."), 4) == 1
