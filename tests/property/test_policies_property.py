"""Any policy under any requests, in the core itself: bounds, whole prefixes, no more hits than there can be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.block import COLD, HOT, WARM
from kvstore.protocol.slab import PAGE_BYTES
from kvstore.replay.optimum import optimum
from kvstore.replay.runs import POLICIES, RIVALS
from kvstore.replay.simulator import TIERS, Simulator
from kvstore.replay.trace import Chain, Trace, made

policies = pytest.mark.parametrize("policy", [*POLICIES, *RIVALS])

paths = st.lists(st.integers(0, 2), min_size=1, max_size=8)
requests = st.lists(paths, min_size=1, max_size=60)


def trace_of(prompts: list[list[int]], seed: int = 0) -> Trace:
    chain = Chain(seed)
    trace = Trace("any", 16)
    for number, ids in enumerate(prompts):
        trace.requests.append(made(chain, float(number), list(ids), 16 * len(ids) - number % 2, 16))
    return trace


def check(simulator: Simulator, blocks: dict[str, int]) -> None:
    residency = simulator.cache.residency
    stored = list(simulator.namespace.blocks.values())
    for name, tier in TIERS.items():
        held = sum(1 for block in stored if block.copies & tier)
        assert held <= blocks.get(name, 0)
        assert residency.counts[tier].blocks == held
    assert residency.budgets[WARM].used_bytes <= blocks["warm"] * PAGE_BYTES
    for block in stored:
        assert block.parent is None or block.parent.copies, "a stored prefix has a hole"
        assert not block.orphan


@policies
@given(prompts=requests, warm=st.integers(1, 12))
def test_one_tier(policy: str, prompts: list[list[int]], warm: int) -> None:
    trace, blocks = trace_of(prompts), {"warm": warm}
    simulator = Simulator(blocks, (POLICIES | RIVALS)[policy])
    hits = 0
    for request in trace.requests:
        stored = set(simulator.namespace.blocks)
        expected = next((i for i, key in enumerate(request.keys) if key not in stored), len(request.keys))
        found = simulator.request(request)
        assert found == min(expected, request.full)
        hits += found
        check(simulator, blocks)
        residency = simulator.cache.residency
        parents = {block.parent for block in simulator.namespace.blocks.values()}
        leaves = [block for block in simulator.namespace.blocks.values() if block not in parents]
        assert (residency.oldest_warm() in leaves) == bool(leaves), "something may always leave"
    assert hits <= optimum(trace, warm)


@policies
@given(prompts=requests, warm=st.integers(2, 10), hot=st.integers(0, 4), cold=st.integers(0, 20))
def test_three_tiers(policy: str, prompts: list[list[int]], warm: int, hot: int, cold: int) -> None:
    blocks = {"hot": hot, "warm": warm, "cold": cold}
    simulator = Simulator(blocks, (POLICIES | RIVALS)[policy])
    for request in trace_of(prompts).requests:
        simulator.request(request)
        check(simulator, blocks)
    for tier in (HOT, COLD, WARM) * 3:  # a parent after its children, whatever tiers they are in
        while simulator.cache.evict(tier, 1)[0]:
            check(simulator, blocks)
    assert not simulator.namespace.blocks, "everything can leave in the end"


@policies
@given(prompts=requests, warm=st.integers(1, 12), seed=st.integers(0, 5))
def test_the_same_seed_gives_the_same_run(policy: str, prompts: list[list[int]], warm: int, seed: int) -> None:
    runs = [Simulator({"warm": warm}, (POLICIES | RIVALS)[policy]).run(trace_of(prompts, seed)) for _ in range(2)]
    assert runs[0] == runs[1]


@given(prompts=requests, warm=st.integers(1, 12), switches=st.lists(st.integers(0, 3), min_size=60, max_size=60))
def test_any_switch_at_any_time_is_safe(prompts: list[list[int]], warm: int, switches: list[int]) -> None:
    simulator, blocks = Simulator({"warm": warm}, POLICIES["adaptive"]), {"warm": warm}
    order = simulator.cache.residency.orders.of(simulator.namespace, WARM)
    for request, best in zip(trace_of(prompts).requests, switches, strict=False):
        order._shadows.best = best  # type: ignore[attr-defined]
        simulator.request(request)
        check(simulator, blocks)
