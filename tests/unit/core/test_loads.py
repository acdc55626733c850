"""Loading: slots reserved for the cold part of a lease, and what becomes of them, however the agent answers."""

from __future__ import annotations

import pytest

from core_checks import check, slots_of
from core_world import PAGE, Answer, World, chain, key, packed, promises, tiers_of, warm_bytes_for
from kvstore.core.block import COLD, HOT, WARM, Namespace
from kvstore.core.leases import Lease
from kvstore.core.reads import Readiness
from kvstore.core.slots import SlotState

COLD_BLOCKS = 64


def tiered(slots: int = 8) -> World:
    return World(warm_bytes_for(slots), cold_bytes=COLD_BLOCKS * PAGE)


@pytest.fixture
def world() -> World:
    """Eight slots of warm, and plenty of cold."""
    return tiered()


def cool(world: World, space: Namespace, keys: list[bytes], parent: bytes = b"") -> None:
    """Store keys so that they lie in cold only."""
    for name in keys:
        assert world.put(space, [name], parent) == ["STORED"]
        world.save_all()
        world.cache.residency.evict_warm(space.blocks[name])
        parent = name if space.chain else b""
    assert all(space.blocks[name].copies == COLD for name in keys)


def states(lease: Lease) -> list[str]:
    return [slot.state.name for slot in lease.parts[0].slots]


def readiness(world: World, lease: Lease, stop: int) -> Readiness:
    return world.cache.reads.readiness(lease, stop)


# -- loading --------------------------------------------------------------------------------------------------


def test_acquire_reserves_slots_for_the_whole_cold_part_at_once(world: World) -> None:
    space = world.open()
    cool(world, space, chain(4))
    lease = world.lease(space, chain(4))
    assert states(lease) == ["FILLING"] * 4
    assert [block.key for block in world.cache.reads.loads] == chain(4)
    assert world.ready(lease) == 0
    check(world)
    for done in range(1, 5):
        load = world.start_load()
        assert load is not None
        world.end_load(load)
        assert world.ready(lease) == done
        check(world)


def test_the_generation_is_promised_before_the_block_is_loaded(world: World) -> None:
    space = world.open()
    cool(world, space, chain(2))
    lease = world.lease(space, chain(2))
    told = promises(lease)
    assert [world.memory.read(promise) for promise in told] == [None, None]
    world.load_all()
    assert [content.key for promise in told if (content := world.memory.read(promise))] == chain(2)


def test_a_lease_is_cut_to_what_was_reserved(world: World) -> None:
    space = world.open()
    cool(world, space, chain(12))
    world.put(space, chain(5, "b"))
    held = world.lease(space, chain(5, "b"))
    lease = world.lease(space, chain(12))
    assert (lease.tokens, len(lease.parts[0].slots), len(lease.parts[0].blocks)) == (48, 3, 3)
    world.load_all()
    assert world.ready(lease) == 3
    world.release(held)
    check(world)


def test_no_room_at_all_is_no_lease(world: World) -> None:
    space = world.open()
    cool(world, space, chain(2))
    world.put(space, chain(8, "b"))
    held = world.lease(space, chain(8, "b"))
    assert world.acquire(space, chain(2)) is None
    check(world)
    world.release(held)
    assert world.acquire(space, chain(2)) is not None


def test_what_lies_behind_the_cut_may_leave(world: World) -> None:
    world = tiered(slots=2)
    space = world.open(chain=False)
    cool(world, space, chain(2))
    world.put(space, [key("pinned"), key("behind")])
    held = world.lease(space, [key("pinned")])
    lease = world.acquire(space, [chain(1)[0], key("behind")])
    assert lease is None  # the only free slot holds a block that was asked for too
    check(world)
    assert world.put(space, [key("new")]) == ["STORED"]
    world.release(held)


def test_two_leases_share_one_load(world: World) -> None:
    space = world.open()
    cool(world, space, chain(2))
    first, second = world.lease(space, chain(2)), world.lease(space, chain(2), session=2)
    assert first.parts[0].slots == second.parts[0].slots
    assert world.load_all() == 2
    assert world.ready(first) == world.ready(second) == 2
    check(world)


def test_a_filling_slot_is_not_freed_because_its_lease_ended(world: World) -> None:
    space = world.open()
    cool(world, space, chain(1))
    lease = world.lease(space, chain(1))
    load = world.start_load()
    assert load is not None
    world.release(lease)
    assert load.slot.state is SlotState.FILLING
    assert world.put(space, chain(8, "b")) == ["STORED"] * 7 + ["NO_ROOM"]
    check(world)
    world.end_load(load)
    assert load.slot.state is SlotState.READY
    check(world)


def test_a_filling_slot_is_not_freed_because_its_session_ended(world: World) -> None:
    space = world.open()
    cool(world, space, chain(1))
    world.lease(space, chain(1))
    load = world.start_load()
    assert load is not None
    world.cache.reads.leases.end_session(1)
    assert load.slot.state is SlotState.FILLING
    world.end_load(load)
    assert tiers_of(load.block) == "warm cold"


def test_a_filling_slot_is_not_freed_because_its_block_was_deleted(world: World) -> None:
    space = world.open()
    cool(world, space, chain(1))
    lease = world.lease(space, chain(1))
    load = world.start_load()
    assert load is not None
    assert world.cache.delete(space, chain(1)[0]) == 1
    assert load.slot.state is SlotState.FILLING
    world.end_load(load)
    assert load.slot.state is SlotState.FREE
    assert not space.blocks
    assert readiness(world, lease, 1) == Readiness(0, 1, None)
    world.release(lease)
    check(world)


def test_a_load_over_a_clear_finds_no_reader(world: World) -> None:
    space = world.open()
    cool(world, space, chain(2))
    lease = world.lease(space, chain(2))
    loads = [world.start_load(), world.start_load()]
    world.cache.clear(space)
    assert world.put(space, chain(2), variant=1) == ["STORED", "STORED"]
    assert loads[0] is not None and loads[1] is not None
    world.end_load(loads[0])
    world.cache.moves.reap(10)
    world.end_load(loads[1])
    assert world.match(space, chain(2)) == 2
    check(world)
    world.release(lease)
    world.cache.moves.reap(10)
    check(world)


@pytest.mark.parametrize("answer", [Answer.CORRUPT, Answer.MISSING])
def test_a_bad_copy_is_dropped_and_a_miss(world: World, answer: Answer) -> None:
    space = world.open()
    cool(world, space, chain(3))
    lease = world.lease(space, chain(3))
    loads = [world.start_load() for _ in range(3)]
    for load, end in zip(loads, (Answer.GOOD, answer, Answer.GOOD), strict=True):
        assert load is not None
        world.end_load(load, end)
    assert states(lease) == ["READY", "FREE", "READY"]
    assert readiness(world, lease, 3) == Readiness(1, 2, None)
    assert world.match(space, chain(3)) == 1
    check(world)
    world.release(lease)
    check(world)


def test_a_busy_agent_costs_the_load_and_not_the_copy(world: World) -> None:
    space = world.open()
    cool(world, space, chain(1))
    lease = world.lease(space, chain(1))
    world.load_all(Answer.BUSY)
    assert readiness(world, lease, 1).lost == 1
    assert world.match(space, chain(1)) == 1
    world.release(lease)
    lease = world.lease(space, chain(1))
    world.load_all()
    assert world.ready(lease) == 1


def test_a_bad_copy_is_retried_from_another_tier() -> None:
    world = World(cold_bytes=64 * PAGE, hot_bytes=64 * PAGE, promote_hits=1)
    space = world.open()
    world.put(space, chain(1))
    world.release(world.lease(space, chain(1)))
    world.promote_all()
    world.save_all()
    world.cache.evict(WARM, PAGE)
    block = space.blocks[chain(1)[0]]
    assert tiers_of(block) == "hot cold"
    lease = world.lease(space, chain(1))
    load = world.start_load()
    assert load is not None and load.tier == HOT
    world.end_load(load, Answer.CORRUPT)
    assert tiers_of(block) == "cold" and load.slot.state is SlotState.FILLING
    check(world)
    world.load_all()
    assert world.ready(lease) == 1
    check(world)


def test_a_copy_that_is_being_read_does_not_leave_its_tier(world: World) -> None:
    space = world.open()
    cool(world, space, chain(1))
    world.lease(space, chain(1))
    load = world.start_load()
    assert load is not None
    assert world.cache.evict(COLD, PAGE) == (0, 0)
    world.end_load(load)
    check(world)
    assert world.cache.evict(COLD, PAGE) == (1, PAGE)  # it may now


def test_nor_after_a_load_that_failed_is_it_stuck_there(world: World) -> None:
    space = world.open()
    cool(world, space, chain(1))
    world.lease(space, chain(1))
    load = world.start_load()
    assert load is not None
    assert world.cache.evict(COLD, PAGE) == (0, 0)
    world.end_load(load, Answer.BUSY)
    check(world)
    assert world.cache.evict(COLD, PAGE) == (1, PAGE)


def test_a_load_whose_tier_went_down_is_a_miss_and_keeps_the_copy(world: World) -> None:
    space = world.open()
    cool(world, space, chain(2))
    lease = world.lease(space, chain(2))
    load = world.start_load()
    assert load is not None
    world.lose_tier(COLD)
    world.end_load(load)
    assert world.start_load() is None  # nothing can serve the second
    assert readiness(world, lease, 2).lost == 1
    check(world)
    world.cache.residency.up[COLD] = True
    assert world.match(space, chain(2)) == 2


# -- prefetch -------------------------------------------------------------------------------------------------


def test_prefetch_loads_without_pinning(world: World) -> None:
    space = world.open()
    cool(world, space, chain(3))
    assert world.cache.reads.prefetch(space, packed(chain(5))) == 3
    assert [slot.pins for slot in slots_of(world)] == [0, 0, 0]
    check(world)
    world.load_all()
    check(world)
    assert world.cache.reads.prefetch(space, packed(chain(5))) == 0
    assert world.ready(world.lease(space, chain(3))) == 3


def test_prefetch_takes_what_room_there_is(world: World) -> None:
    space = world.open()
    cool(world, space, chain(12))
    assert world.cache.reads.prefetch(space, packed(chain(12))) == 8
    assert world.cache.reads.prefetch(space, packed(chain(12, "unknown"))) == 0
    world.load_all()
    check(world)
