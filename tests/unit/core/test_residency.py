"""Which copies exist where: room in warm, slabs that change hands, and the order in which blocks leave each tier."""

from __future__ import annotations

import random

import pytest

from core_checks import check, live_blocks, slots_of
from core_world import PAGE, World, chain, key, tiers_of, warm_bytes_for
from kvstore.core.block import COLD, HOT, WARM, Block, Namespace
from kvstore.core.puts import PutPlan


@pytest.fixture
def world() -> World:
    return World(cold_bytes=64 * PAGE)


def dump(world: World, tier: int, space: Namespace) -> list[str]:
    """The order in which blocks leave a tier: names of the blocks that do, first to last."""
    names = {key((name, i)): f"{name}{i}" for name in "abcdxyz" for i in range(10)}
    order = []
    while True:
        before = {block for block in space.blocks.values() if block.copies & tier}
        if world.cache.evict(tier, 1)[0] == 0:
            return order
        order += [names[block.key] for block in before if not block.copies & tier]
        check(world)


# -- order ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", [WARM, COLD])
def test_leaves_leave_first_the_least_recently_used_before_others(world: World, tier: int) -> None:
    space = world.open()
    world.put(space, chain(3, "a"))
    world.put(space, chain(2, "b"))
    world.put(space, chain(1, "c"), chain(2, "a")[-1])
    world.match(space, chain(2, "b"))
    world.save_all()
    assert dump(world, tier, space) == ["a2", "c0", "a1", "a0", "b1", "b0"]


def test_a_use_shows_in_every_tier(world: World) -> None:
    space = world.open()
    for name in "abc":
        world.put(space, chain(1, name))
    world.save_all()
    world.match(space, chain(1, "a"))
    assert dump(world, WARM, space) == ["b0", "c0", "a0"]
    assert dump(world, COLD, space) == ["b0", "c0", "a0"]


def test_orphans_leave_first(world: World) -> None:
    space = world.open()
    world.put(space, chain(1, "b"))
    world.put(space, chain(4, "a"))
    world.put(space, chain(1, "c"))
    lost = space.blocks[chain(2, "a")[1]]
    world.cache.residency.drop_warm(lost)
    world.cache.index.lost(lost)
    world.match(space, chain(4, "a"))
    check(world)
    assert dump(world, WARM, space) == ["a3", "a2", "b0", "c0", "a0"]


def test_orphans_of_a_restart_leave_first(world: World) -> None:
    space = world.open()
    world.put(space, chain(2, "a"))
    world.put(space, chain(2, "b"))
    world.put(space, chain(2, "c"))
    world.save_all()
    del world.media[COLD][space.digest, chain(1, "b")[0]]
    space = world.restart({"ns": space})["ns"]
    check(world)
    assert dump(world, COLD, space)[0] == "b1"


def test_an_orphan_that_is_found_again_keeps_its_place_until_it_is_used(world: World) -> None:
    space = world.open()
    world.put(space, chain(3, "a"))
    lost = space.blocks[chain(1, "a")[0]]
    world.cache.residency.drop_warm(lost)
    world.cache.index.lost(lost)
    world.put(space, chain(1, "b"))
    world.put(space, chain(1, "a"))
    assert world.match(space, chain(3, "a")) == 3
    check(world)
    assert dump(world, WARM, space) == ["b0", "a2", "a1", "a0"]


def test_a_parent_is_never_evicted_before_its_children(world: World) -> None:
    order = random.Random(3)
    space = world.open()
    names: list[bytes] = []
    for step in range(300):
        parent = order.choice([b"", *names[-20:]])
        name = key(("n", step))
        if world.put(space, [name], parent if parent and parent in space.blocks else b"") == ["STORED"]:
            names.append(name)
        if step % 3 == 0:
            for save in world.start_saves(2):
                world.end_save(save)
        if step % 5 == 0:
            world.cache.evict(order.choice([WARM, COLD]), PAGE)
        assert world.cache.index.orphans == 0
        check(world)


# -- room in warm ---------------------------------------------------------------------------------------------


def test_take_gives_no_more_than_there_is(world: World) -> None:
    space = world.open()
    slots = world.cache.residency.take(space, 20, PutPlan(space, 0)).slots
    assert len(slots) == 8
    assert world.cache.residency.take(space, 1, PutPlan(space, 0)).slots == []
    for slot in slots:
        world.cache.residency.abandon(slot)
    check(world)
    assert world.cache.residency.take(space, 0, PutPlan(space, 0)).slots == []


def test_take_drops_no_more_than_it_must(world: World) -> None:
    space = world.open()
    for i in range(6):
        world.put(space, chain(1, i))
    slots = world.cache.residency.take(space, 4, PutPlan(space, 0)).slots
    assert len(slots) == 4
    assert world.cache.residency.counts[WARM].blocks == 4
    for slot in slots:
        world.cache.residency.abandon(slot)


def test_what_is_dropped_unsaved_is_counted(world: World) -> None:
    space = world.open()
    world.put(space, chain(2))
    world.save_all()
    world.put(space, chain(2, "b"))
    world.cache.evict(WARM, 4 * PAGE)
    assert world.cache.residency.dropped_unsaved == 2
    assert world.cache.residency.counts[WARM].evictions == 4


def test_a_block_in_warm_only_stays_while_children_hang_on_it(world: World) -> None:
    space = world.open()
    world.put(space, chain(2))
    parent, child = (space.blocks[name] for name in chain(2))
    saves = {save.copy.block: save for save in world.start_saves()}
    world.end_save(saves[child])
    world.end_save(saves[parent], None)
    assert dump_once(world, WARM) == [child]
    assert dump_once(world, WARM) == []
    world.save_all()
    assert dump_once(world, WARM) == [parent]


def dump_once(world: World, tier: int) -> list[Block]:
    before = {block for block in live_blocks(world) if block.copies & tier}
    world.cache.evict(tier, 1)
    return [block for block in before if not block.copies & tier]


def test_tenants_do_not_drop_each_others_blocks_from_warm() -> None:
    world = World(warm_bytes=2 * (PAGE + 4 * PAGE), slab_bytes=4 * PAGE)
    mine, theirs = world.open("mine", "a"), world.open("theirs", "b")
    world.put(mine, chain(4))
    world.put(theirs, chain(4))
    assert world.put(mine, chain(4, "b")) == ["STORED"] * 4
    assert (world.match(mine, chain(4)), world.match(theirs, chain(4))) == (0, 4)
    check(world)


# -- slabs that change hands ----------------------------------------------------------------------------------


def two_classes() -> tuple[World, Namespace, Namespace]:
    """A pool with room for two slabs: both are the small blocks'."""
    world = World(warm_bytes=2 * (PAGE + 4 * PAGE), slab_bytes=4 * PAGE, cold_bytes=64 * PAGE)
    small, large = world.open("small"), world.open("large", nbytes=2 * PAGE)
    world.put(small, chain(8))
    return world, small, large


def reclaim(world: World, space: Namespace) -> bool:
    slab_id = world.cache.residency.lending.reclaim_slab(space.tenant, space.slot_bytes)
    if slab_id is None:
        return False
    assert world.cache.slots.in_slab(slab_id) == []
    world.cache.allocator.retired(slab_id)
    return True


def test_a_class_without_slabs_takes_one_from_another() -> None:
    world, small, large = two_classes()
    assert world.put(large, chain(2, "large")) == ["NO_ROOM", "NO_PARENT"]
    assert reclaim(world, large)
    check(world)
    assert world.put(large, chain(2, "large")) == ["STORED", "STORED"]
    check(world)
    assert world.match(small, chain(8)) in (0, 4)


def test_reclaiming_a_slab_leaves_no_hole() -> None:
    """The slab holds the upper half of a chain that is saved nowhere: the lower half goes with it."""
    world, small, large = two_classes()
    root = small.blocks[chain(1)[0]].slot
    assert root is not None
    world.lease(small, chain(8)[4:])  # the lower half is held, so this slab cannot be emptied
    check(world)
    assert not reclaim(world, large)
    check(world)
    world.cache.reads.leases.end_session(1)
    assert reclaim(world, large)
    assert world.cache.index.orphans == 0
    check(world)


def test_saved_blocks_survive_the_reclaim_of_their_slab() -> None:
    world, small, large = two_classes()
    world.save_all()
    assert reclaim(world, large)
    assert world.match(small, chain(8)) == 8
    assert sum(tiers_of(block) == "cold" for block in small.blocks.values()) == 4
    check(world)


@pytest.mark.parametrize("use", ["lease", "put", "save", "load"])
def test_a_slab_in_use_is_not_reclaimed(use: str) -> None:
    world, small, large = two_classes()
    if use == "lease":
        world.lease(small, chain(8))
    elif use == "save":
        world.start_saves(8)
    elif use == "put":
        world.cache.evict(WARM, 8 * PAGE)
        world.begin(small, chain(8, "b"))
    else:
        world.save_all()
        world.cache.evict(WARM, 8 * PAGE)
        world.lease(small, chain(8))
        world.cache.reads.leases.end_session(1)
    assert not reclaim(world, large)
    check(world)


def test_a_class_does_not_reclaim_its_own_slabs() -> None:
    world, small, _ = two_classes()
    assert not reclaim(world, small)


def test_a_slab_is_lent_by_the_class_that_has_been_idle_for_long() -> None:
    world = World(warm_bytes=2 * (PAGE + 4 * PAGE), slab_bytes=4 * PAGE)
    idle, busy = world.open("idle"), world.open("busy", nbytes=2 * PAGE)
    world.put(idle, chain(4))
    for turn in range(30):
        world.put(busy, chain(4, turn))
    residency = world.cache.residency
    borrower = (busy.tenant, busy.slot_bytes)
    assert residency.lending.lender(borrower) == (idle.tenant, idle.slot_bytes)
    assert residency.lending.lender((idle.tenant, idle.slot_bytes)) is None
    world.match(idle, chain(4))
    assert residency.lending.lender(borrower) is None
    check(world)


def test_two_equally_busy_classes_lend_each_other_nothing() -> None:
    world = World(warm_bytes=2 * (PAGE + 40 * PAGE), slab_bytes=40 * PAGE)
    spaces = [world.open(name, name) for name in "ab"]
    for turn in range(50):
        for space in spaces:
            for i in range(4):
                world.put(space, chain(1, (turn, i)))
    assert [world.cache.residency.lending.lender((space.tenant, space.slot_bytes)) for space in spaces] == [None, None]


# -- copies below ---------------------------------------------------------------------------------------------


def test_dropping_a_cold_copy_makes_a_warm_block_unsaved_again(world: World) -> None:
    space = world.open()
    world.put(space, chain(1))
    world.save_all()
    residency = world.cache.residency
    assert not residency.dirty
    world.cache.evict(COLD, PAGE)
    assert len(residency.dirty) == 1
    check(world)


def test_the_last_copy_gone_the_block_is_forgotten(world: World) -> None:
    space = world.open()
    world.put(space, chain(1))
    world.save_all()
    world.cache.evict(WARM, PAGE)
    world.cache.evict(COLD, PAGE)
    assert not space.blocks
    assert world.cache.residency.deletes[COLD] == [(space.digest, chain(1)[0])]


def test_cold_counts_what_it_stores_and_what_that_was(world: World) -> None:
    space = world.open()
    world.put(space, chain(3))
    for save in world.start_saves():
        world.end_save(save, 1000)
    assert world.cache.residency.budgets[COLD].used_bytes == 3000
    assert world.cache.residency.raw_cold_bytes == 3 * PAGE
    check(world)
    world.cache.evict(COLD, 1500)
    assert (world.cache.residency.budgets[COLD].used_bytes, world.cache.residency.raw_cold_bytes) == (1000, PAGE)


def test_no_more_leaves_than_must_for_room_below() -> None:
    world = World(hot_bytes=4 * PAGE, promote_hits=1)
    space = world.open()
    for name in "abcd":
        world.put(space, chain(1, name))
        world.release(world.lease(space, chain(1, name)))
    world.promote_all()
    assert world.cache.residency.make_room_below(HOT, space, PAGE + 1)
    assert world.cache.residency.counts[HOT].blocks == 2
    assert not world.cache.residency.make_room_below(HOT, space, 4 * PAGE + 1)
    assert world.cache.residency.counts[HOT].blocks == 2
    check(world)


def test_the_orders_stay_in_bound_under_put_and_clear_without_pressure() -> None:
    world = World(warm_bytes_for(400), cold_bytes=500 * PAGE)
    space = world.open()
    for turn in range(30):
        world.put(space, chain(300, turn))
        world.save_all()
        world.cache.clear(space)
        while world.cache.moves.reap(64):
            pass
        world.delete_all()
    residency = world.cache.residency
    assert slots_of(world) == []
    for order in (residency.orders.of(space, WARM), residency.orders.of(space, COLD)):
        assert len(order._heap) <= 256  # type: ignore[attr-defined]
