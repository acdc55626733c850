"""Loads: settled block by block, and what becomes of those whose agent fails, lies, or comes too late."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from core_world import chain
from kvstore.core.benefit import ENOUGH, UNKNOWN, Cost
from kvstore.core.block import COLD, HOT, WARM, Block
from kvstore.protocol.errors import InvalidRequest
from kvstore.tiers.base import Outcome, TierItem
from played_media import NBYTES, PATIENCE_S, EngineRig, refs_of
from polling import eventually

MakeRig = Callable[..., EngineRig]
BLOCKS = 16


@pytest.fixture
def cold(rig: EngineRig) -> list[Block]:
    """A prefix that is in cold and nowhere else."""
    rig.mover.start()
    return cold_prefix(rig)


def cold_prefix(rig: EngineRig) -> list[Block]:
    blocks = rig.put("a", BLOCKS)
    assert rig.mover.flush(PATIENCE_S) == 0
    rig.evict_warm()
    assert {block.copies for block in blocks} == {COLD}
    return blocks


def wait_for(rig: EngineRig, name: str = "a") -> int:
    lease = rig.acquire(name, BLOCKS)
    eventually(lambda: not rig.cache.slots.filling, "the loads to end")
    count = rig.ready(lease)
    rig.release(lease)
    return count


def test_the_first_blocks_are_ready_while_the_last_are_still_read(rig: EngineRig, cold: list[Block]) -> None:
    go_on = threading.Event()
    late = refs_of(cold)[5]
    rig.cold.before_read = lambda item: go_on.wait(PATIENCE_S) if item.ref == late else None
    lease = rig.acquire("a", BLOCKS)
    eventually(lambda: rig.ready(lease) == 5, "five blocks")
    go_on.set()
    eventually(lambda: rig.ready(lease) == BLOCKS, "the rest")
    rig.release(lease)
    assert len(rig.cold.of("read")) == 1, "one call for all of them"


def test_a_waiter_is_told_block_by_block(rig: EngineRig, cold: list[Block]) -> None:
    go_on = threading.Event()
    late = refs_of(cold)[1]
    rig.cold.before_read = lambda item: go_on.wait(PATIENCE_S) if item.ref == late else None
    lease = rig.acquire("a", BLOCKS)
    with rig.lock:
        slots = lease.parts[0].slots
        told = None if slots[0].state.name == "READY" else rig.mover.inflight.join(slots[0])
        last = rig.mover.inflight.join(slots[-1])
    assert told is None or told.wait(PATIENCE_S)
    assert not last.is_set()
    go_on.set()
    assert last.wait(PATIENCE_S)
    rig.release(lease)


def test_what_went_with_its_agent_is_not_forgotten(rig: EngineRig, cold: list[Block]) -> None:
    lost = refs_of(cold)[4]
    rig.cold.vanishes_at = lambda item: item.ref == lost
    assert wait_for(rig) == 4
    assert all(block.copies & COLD for block in cold)
    assert all(block.slot is None for block in cold[4:])
    rig.cold.vanishes_at = lambda item: False
    assert wait_for(rig) == BLOCKS


@pytest.mark.parametrize("outcome", [Outcome.MISSING, Outcome.CORRUPT])
def test_what_is_lost_is_forgotten_and_nothing_else(rig: EngineRig, cold: list[Block], outcome: Outcome) -> None:
    ref = refs_of(cold)[4]
    if outcome is Outcome.MISSING:
        del rig.cold.blocks[ref]
    else:
        rig.cold.blocks[ref] = bytes(4096)
    assert wait_for(rig) == 4
    assert [bool(block.copies) for block in cold] == [True] * 4 + [False] + [True] * (BLOCKS - 5)
    assert rig.cache.residency.counts[COLD].corrupt == (outcome is Outcome.CORRUPT)


@pytest.mark.parametrize("outcome", [Outcome.MISSING, Outcome.CORRUPT])
def test_a_load_that_asked_for_other_bytes_does_not_cost_the_copy_that_is_there_now(
    rig: EngineRig, cold: list[Block], outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = cold[0]

    def another_copy(item: TierItem) -> Outcome:
        if item.ref == refs_of([block])[0]:
            block.checksum = b"x" * 16
            return outcome
        return Outcome.OK

    monkeypatch.setattr(rig.cold, "_fill", another_copy)
    assert wait_for(rig) == 0
    assert block.copies == COLD
    assert rig.cache.residency.counts[COLD].corrupt == 0


def test_a_load_that_outlives_a_delete_leaves_the_newer_copy_alone(rig: EngineRig, cold: list[Block]) -> None:
    """Deleted while it loads, put and saved again: the late answer is of nobody's block."""
    reading, go_on = threading.Event(), threading.Event()

    def slow(item: TierItem) -> None:
        reading.set()
        go_on.wait(PATIENCE_S)

    rig.cold.before_read = slow
    lease = rig.acquire("a", BLOCKS)
    assert reading.wait(PATIENCE_S)
    with rig.lock:
        rig.cache.delete(rig.space, cold[0].key)
    rig.mover.kick_saves()
    eventually(lambda: not rig.cold.blocks, "the deletion to be carried out")
    newer = rig.put("a", BLOCKS)
    assert rig.mover.flush(PATIENCE_S) == 0
    go_on.set()
    eventually(lambda: not rig.cache.slots.filling, "the loads to end")
    rig.release(lease)
    assert all(block.copies == WARM | COLD for block in newer)
    rig.evict_warm()
    assert wait_for(rig) == BLOCKS


def test_a_defect_costs_its_batch_and_not_the_thread(
    rig: EngineRig, cold: list[Block], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    defects = iter(range(2))
    next_loads = rig.mover._next_loads

    def fail() -> object:
        for number in defects:
            raise ZeroDivisionError(f"nobody thought of {number}")
        return next_loads()

    monkeypatch.setattr(rig.mover, "_next_loads", fail)
    assert wait_for(rig) == BLOCKS
    assert all(f"nobody thought of {number}" in caplog.text for number in range(2))


def test_an_agent_that_refuses_a_slab_costs_its_loads_only(rig: EngineRig, cold: list[Block]) -> None:
    def refuse() -> None:
        raise InvalidRequest("no")

    rig.mover._spokes._spokes[COLD].mapped.clear()
    rig.cold.before_map = refuse
    assert wait_for(rig) == 0
    assert all(block.copies & COLD for block in cold)
    rig.cold.before_map = lambda: None
    assert wait_for(rig) == BLOCKS


def test_a_tier_that_hangs_over_a_slab_does_not_hold_up_the_other(make_rig: MakeRig) -> None:
    """Regression: one lock for both tiers was held while an agent mapped a slab."""
    rig = make_rig(hot_bytes=1 << 20)
    mapping, go_on = threading.Event(), threading.Event()

    def hang() -> None:
        mapping.set()
        go_on.wait(PATIENCE_S)

    rig.mover.start()
    cold_prefix(rig)
    (stray,) = rig.put("stray", 1)
    rig.hot.before_map = hang
    stuck = threading.Thread(target=rig.mover.read_one, args=(HOT, stray, stray.slot))
    stuck.start()
    assert mapping.wait(PATIENCE_S)
    rig.mover._spokes._spokes[COLD].mapped.clear()
    assert wait_for(rig) == BLOCKS
    go_on.set()
    stuck.join()


def test_retired_slabs_are_unmapped_where_they_were_mapped(make_rig: MakeRig) -> None:
    rig = make_rig(hot_bytes=1 << 20)
    rig.put("a", 4)
    rig.mover.start()
    assert rig.mover.flush(PATIENCE_S) == 0
    (slab_id,) = rig.cold.mapped
    rig.mover.slab_dropped(slab_id)
    rig.mover.slab_dropped(slab_id)
    assert rig.cold.mapped == set()


def test_a_prefix_is_asked_for_in_its_order(rig: EngineRig, cold: list[Block]) -> None:
    assert wait_for(rig) == BLOCKS
    assert [ref for batch in rig.cold.of("read") for ref in batch] == refs_of(cold)
    assert [block.key for block in cold] == chain(BLOCKS)


def test_the_gate_learns_what_loads_cost(rig: EngineRig, cold: list[Block]) -> None:
    """From the call to each block that came, in the time of the engine's clock; what is lost teaches nothing."""

    def take(item: TierItem) -> None:
        rig.now_s += 0.25

    rig.cold.before_read = take
    for _ in range(ENOUGH):
        assert rig.cache.gate.costs.cost(COLD) == UNKNOWN
        assert wait_for(rig) == BLOCKS
        eventually(lambda: not rig.cache.gate.costs.stalled_s(COLD, rig.now_s + 1.0), "the batch to end")
        rig.evict_warm()
    assert rig.cache.gate.costs.cost(COLD) == Cost(0.0, pytest.approx(0.25 / NBYTES))
    rig.cold.vanishes_at = lambda item: True
    lease = rig.acquire("a", BLOCKS)
    eventually(lambda: not rig.cache.slots.filling, "the loads to end")
    rig.release(lease)
    assert rig.cache.gate.costs.cost(COLD) == Cost(0.0, pytest.approx(0.25 / NBYTES))
    assert not any(rig.cache.reads.queued_bytes.values())
