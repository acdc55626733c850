"""Background moves: what is saved and promoted, in which order, and what becomes of copies whose block has changed."""

from __future__ import annotations

import pytest

from core_checks import all_blocks, check, check_media, slots_of
from core_world import PAGE, World, chain, tiers_of, warm_bytes_for
from kvstore.core.block import COLD, WARM, Namespace
from kvstore.core.moves import SAVE_AHEAD
from kvstore.core.slots import SlotState


@pytest.fixture
def world() -> World:
    """Eight slots of warm, plenty of cold, no hot."""
    return World(cold_bytes=64 * PAGE)


def names_of(space: Namespace, tier: int) -> set[bytes]:
    return {name for name, block in space.blocks.items() if block.copies & tier}


# -- saving ---------------------------------------------------------------------------------------------------


def test_saving_starts_before_warm_is_full_of_what_is_saved_nowhere() -> None:
    world = World(warm_bytes_for(99), cold_bytes=200 * PAGE)
    space = world.open()
    stored = 0
    while not world.cache.moves.wants_saving():
        world.put(space, chain(1, stored))
        stored += 1
    free = world.warm_bytes - stored * PAGE
    assert SAVE_AHEAD * world.warm_bytes - PAGE <= free < SAVE_AHEAD * world.warm_bytes
    save_ahead(world)
    assert world.cache.residency.leaving_bytes <= 2 * PAGE
    check(world)


def save_ahead(world: World) -> None:
    """What the saver does when it is woken."""
    while world.cache.moves.wants_saving():
        for save in world.start_saves(4, flush=False):
            world.end_save(save)


def world_with_old_blocks() -> tuple[World, Namespace]:
    """30 blocks that only cold has, then 75 younger ones in a warm tier of 100 that are saved nowhere."""
    world = World(warm_bytes_for(100), cold_bytes=400 * PAGE)
    space = world.open()
    world.put(space, chain(30))
    world.save_all()
    world.cache.evict(WARM, 30 * PAGE)
    for number in range(75):
        world.put(space, chain(1, f"young-{number}"))
    return world, space


def test_what_reads_bring_in_does_not_put_the_saver_to_sleep() -> None:
    """Regression: it counted as room, being saved, while blocks that were saved nowhere were dropped for it."""
    world, space = world_with_old_blocks()
    assert not world.cache.moves.wants_saving()
    for stop in (10, 20, 30):
        lease = world.lease(space, chain(30)[:stop])
        world.load_all()
        world.release(lease)
        save_ahead(world)
        check(world)
    assert world.cache.residency.dropped_unsaved == 0
    assert all(world.match(space, chain(1, f"young-{number}")) for number in range(75))


def test_a_block_on_its_way_out_that_is_used_again_stays() -> None:
    """It was saved ahead. With the next use others leave instead, and its copy below is the first to go there."""
    world = World(warm_bytes_for(40), cold_bytes=400 * PAGE)
    space = world.open()
    for number in range(40):
        world.put(space, chain(1, number))
    save_ahead(world)
    out = [space.blocks[chain(1, number)[0]] for number in range(4)]
    assert all(block.spare & WARM and block.copies & COLD for block in out)
    for number in range(4):
        world.release(world.lease(space, chain(1, number)))
    assert all(not block.spare & WARM and block.spare & COLD for block in out)
    save_ahead(world)
    for number in range(4):
        world.put(space, chain(1, f"new-{number}"))
    assert all(block.copies & WARM for block in out)
    assert world.cache.residency.dropped_unsaved == 0
    assert world.cache.evict(COLD, PAGE) == (1, PAGE)
    assert sum(not block.copies & COLD for block in out) == 1
    check(world)


def test_a_prefix_longer_than_warm_is_stored(world: World) -> None:
    """Its end is pinned while more is put behind it, and all hangs on that: what is saved may go all the same."""
    space = world.open()
    keys = chain(40)
    for start in range(0, 40, 4):
        parent = keys[start - 1] if start else b""
        assert world.put(space, keys[start : start + 4], parent) == ["STORED"] * 4
        world.save_all()
        check(world)
    assert world.match(space, keys) == 40
    check_media(world)


def test_nothing_is_saved_where_there_is_no_cold_tier() -> None:
    world = World()
    world.put(world.open(), chain(8))
    assert not world.cache.moves.wants_saving()


def test_nothing_is_saved_while_cold_is_down(world: World) -> None:
    world.put(world.open(), chain(8))
    assert world.cache.moves.wants_saving()
    world.lose_tier(COLD)
    assert not world.cache.moves.wants_saving()


def test_as_long_as_cold_has_room_a_block_is_saved_with_what_it_hangs_on(world: World) -> None:
    """A kill at any moment leaves whole prefixes there."""
    space = world.open()
    for name in "abc":
        world.put(space, chain(2, name))
    world.cache.moves.let_leave(PAGE)
    assert [save.copy.block.key for save in world.start_saves(3, flush=False)] == chain(2, "a")
    check(world)


def test_the_oldest_is_saved_first_and_leaves_first() -> None:
    world = World(cold_bytes=8 * PAGE)
    space = world.open()
    for name in "abc":
        world.put(space, chain(2, name))
    order = [*reversed(chain(2, "a")), *reversed(chain(2, "b"))]
    for name in order:
        world.cache.moves.let_leave(world.cache.residency.leaving_bytes + PAGE)
        (save,) = world.start_saves(3, flush=False)
        assert save.copy.block.key == name
        world.end_save(save)
    for name in order:
        assert world.cache.evict(WARM, PAGE) == (1, PAGE)
        assert tiers_of(space.blocks[name]) == "cold", "what was saved is what leaves"
    check(world)


def test_a_batch_is_bounded_in_blocks_and_bytes(world: World) -> None:
    world.put(world.open(), chain(8))
    assert len(world.start_saves(3)) == 3
    assert len(world.start_saves(8, 2 * PAGE)) == 2
    assert len(world.start_saves(8, 1)) == 1  # at least one, or a large block would never be saved
    assert world.start_saves(0) == []
    check(world)


def test_a_block_being_saved_stays_and_is_not_saved_twice(world: World) -> None:
    space = world.open()
    world.put(space, chain(8))
    batch = world.start_saves(8)
    assert len(batch) == 8 and world.start_saves(8) == []
    assert world.cache.evict(WARM, 8 * PAGE) == (0, 0)
    assert world.put(space, chain(1, "b")) == ["NO_ROOM"]
    for save in batch:
        world.end_save(save)
        check(world)
    assert world.put(space, chain(1, "b")) == ["STORED"]
    check(world)


def test_what_is_saved_is_dropped_for_nothing(world: World) -> None:
    space = world.open()
    world.put(space, chain(8))
    world.save_all()
    world.put(space, chain(8, "b"))
    assert world.cache.residency.dropped_unsaved == 0
    assert world.match(space, chain(8)) == 8
    check(world)
    check_media(world)


def test_a_parent_saved_before_its_child_may_leave_warm(world: World) -> None:
    space = world.open()
    world.put(space, chain(2))
    (save,) = world.start_saves(1)
    world.end_save(save)
    parent, child = (space.blocks[name] for name in chain(2))
    assert (tiers_of(parent), tiers_of(child)) == ("warm cold", "warm")
    world.cache.evict(WARM, PAGE)
    assert not child.copies, "the leaf leaves first all the same"
    check(world)


def test_a_save_that_failed_is_tried_again_after_the_others(world: World) -> None:
    space = world.open()
    world.put(space, chain(4))
    for save in world.start_saves(2):
        world.end_save(save, None)
    assert world.cache.residency.counts[COLD].write_failures == 2
    assert [save.copy.block.key for save in world.start_saves(4)] == [*chain(4)[2:], *chain(2)]
    check(world)


def test_what_cold_did_not_take_is_tried_again_without_new_traffic(world: World) -> None:
    """Regression: once all that leaves had failed, nothing was wanted, and a disk that has room again was not asked."""
    space = world.open()
    world.put(space, chain(1))
    world.cache.moves.let_leave(PAGE)
    (save,) = world.start_saves(flush=False)
    world.end_save(save, None)
    assert world.cache.moves.wants_saving()
    (save,) = world.start_saves(flush=False)
    world.end_save(save)
    assert tiers_of(space.blocks[chain(1)[0]]) == "warm cold"
    check(world)


def test_a_block_deleted_while_it_is_saved_is_deleted_from_cold(world: World) -> None:
    space = world.open()
    world.put(space, chain(1))
    (save,) = world.start_saves()
    world.cache.delete(space, chain(1)[0])
    assert save.copy.slot.state is SlotState.RETIRING
    check(world)
    world.end_save(save)
    assert slots_of(world) == []
    world.delete_all()
    check(world)
    check_media(world)


def test_a_block_stored_again_while_it_is_saved_keeps_its_own_bytes(world: World) -> None:
    """The older bytes must not become the newer block's copy: its checksum would call them corrupt."""
    space = world.open()
    world.put(space, chain(2))
    saves = world.start_saves()
    lease = world.lease(space, chain(2))
    assert world.cache.delete(space, chain(1)[0]) == 2
    world.put(space, chain(2), variant=1)
    for save in saves:
        world.end_save(save)
    world.delete_all()
    check(world)
    check_media(world)
    world.save_all()
    world.cache.evict(WARM, 2 * PAGE)
    world.release(lease)
    again = world.lease(space, chain(2))
    world.load_all()
    assert world.ready(again) == 2


def test_a_hole_filled_again_while_it_is_saved_keeps_its_own_bytes(world: World) -> None:
    """As above, where the record outlived its copies because children hang on it."""
    space = world.open()
    world.put(space, chain(2))
    saves = world.start_saves(1)
    parent = space.blocks[chain(1)[0]]
    world.cache.residency.drop_warm(parent)  # proved corrupt
    world.cache.index.lost(parent)
    assert world.put(space, chain(1), variant=1) == ["STORED"]
    assert space.blocks[chain(1)[0]] is parent
    world.end_save(saves[0])
    world.delete_all()
    check(world)
    check_media(world)


def test_what_is_in_hot_is_saved_too() -> None:
    """Hot forgets at every restart: the most valuable blocks must not be the only unsaved ones."""
    world = World(cold_bytes=64 * PAGE, hot_bytes=64 * PAGE, promote_hits=1)
    space = world.open()
    world.put(space, chain(2))
    world.release(world.lease(space, chain(2)))
    world.promote_all()
    assert world.save_all() == 2
    assert [tiers_of(block) for block in space.blocks.values()] == ["hot warm cold"] * 2
    check(world)


# -- room in cold ---------------------------------------------------------------------------------------------


def test_a_batch_does_not_take_the_same_room_twice() -> None:
    world = World(cold_bytes=4 * PAGE)
    space = world.open()
    world.put(space, chain(8))
    batch = world.start_saves(8)
    assert len(batch) == 4
    check(world)
    for save in batch:
        world.end_save(save)
        check(world)


def test_room_is_given_back_when_a_save_fails() -> None:
    world = World(cold_bytes=4 * PAGE)
    world.put(world.open(), chain(8))
    for save in world.start_saves(8):
        world.end_save(save, None)
    assert world.cache.residency.budgets[COLD].used_bytes == 0
    assert len(world.start_saves(8)) == 4
    check(world)


def test_blocks_that_take_more_in_cold_than_they_have_do_not_overrun_it() -> None:
    world = World(cold_bytes=4 * PAGE)
    space = world.open()
    for name in "abcd":
        world.put(space, chain(1, name))
    for save in world.start_saves(4):
        world.end_save(save, PAGE + 300)
        check(world)
    assert len(names_of(space, COLD)) == 3


def test_room_in_cold_is_made_by_dropping_the_oldest() -> None:
    world = World(cold_bytes=4 * PAGE)
    space = world.open()
    for name in "abcdef":
        world.put(space, chain(1, name))
        world.save_all()
        world.cache.evict(WARM, PAGE)
        world.match(space, chain(1, "a"))
    assert [name for name in "abcdef" if world.match(space, chain(1, name))] == ["a", "d", "e", "f"]
    check(world)
    check_media(world)


def test_a_block_larger_than_cold_empties_nothing_and_holds_nobody_up() -> None:
    world = World(warm_bytes=40 * PAGE, slab_bytes=8 * PAGE, cold_bytes=4 * PAGE)
    small, large = world.open("small"), world.open("large", nbytes=5 * PAGE)
    world.put(small, chain(3))
    world.save_all()
    world.put(large, chain(2, "large"))
    world.put(small, chain(1, "b"))
    assert world.save_all() == 1
    assert names_of(small, COLD) == {*chain(3), *chain(1, "b")}
    assert world.cache.residency.counts[COLD].evictions == 0
    check(world)


def test_a_tenant_without_room_in_cold_holds_nobody_up() -> None:
    world = World(
        warm_bytes=40 * PAGE,
        slab_bytes=8 * PAGE,
        cold_bytes=64 * PAGE,
        tenant_bytes={COLD: {"none": 0, "two": 2 * PAGE}},
    )
    none, two, free = world.open("none", "none"), world.open("two", "two"), world.open("free", "free")
    world.put(none, chain(10))
    world.put(two, chain(4))
    world.put(free, chain(3))
    assert len(world.start_saves(8)) == 5
    check(world)


def test_a_tenant_over_its_limit_drops_only_its_own() -> None:
    world = World(
        warm_bytes=40 * PAGE, slab_bytes=8 * PAGE, cold_bytes=6 * PAGE, tenant_bytes={COLD: {"small": 2 * PAGE}}
    )
    small, other = world.open("small", "small"), world.open("other", "other")
    for i in range(4):
        world.put(other, chain(1, ("other", i)))
    world.save_all()
    world.cache.evict(WARM, 4 * PAGE)  # the others' are the oldest in cold, and nowhere else
    for i in range(6):
        world.put(small, chain(1, ("small", i)))
        world.save_all()
        world.cache.evict(WARM, PAGE)
        check(world)
    assert len(names_of(other, COLD)) == 4
    assert len(names_of(small, COLD)) == 2
    check_media(world)


def test_blocks_of_one_tenant_can_leave_after_another_was_over_its_limit() -> None:
    """Looking for room of one tenant must not lose sight of the others' blocks."""
    world = World(
        warm_bytes=40 * PAGE, slab_bytes=8 * PAGE, cold_bytes=6 * PAGE, tenant_bytes={COLD: {"small": 1 * PAGE}}
    )
    small, other = world.open("small", "small"), world.open("other", "other")
    for i in range(5):
        world.put(other, chain(1, ("other", i)))
    world.save_all()
    for i in range(3):
        world.put(small, chain(1, ("small", i)))
        world.save_all()
    check(world)
    world.cache.evict(WARM, 8 * PAGE)
    for i in range(4):
        world.put(other, chain(1, ("more", i)))
    assert world.save_all() == 4
    check(world)
    assert world.cache.evict(COLD, 6 * PAGE)[0] == 6


def test_a_cold_tier_smaller_than_warm_is_not_written_over_and_over() -> None:
    """To save one warm block in place of another gains nothing, and wears the drive."""
    world = World(cold_bytes=3 * PAGE)
    space = world.open()
    for i in range(8):
        world.put(space, chain(1, i))
    assert world.cache.moves.wants_saving()
    assert world.save_all() == 3  # and then no more, though most of warm is unsaved
    check(world)
    world.cache.evict(WARM, 7 * PAGE)
    world.put(space, chain(1, "a"))
    world.put(space, chain(1, "b"))
    assert world.save_all() == 2  # in place of what has left warm since
    check(world)
    check_media(world)


def test_what_is_spared_for_being_in_warm_can_be_evicted_by_hand() -> None:
    world = World(cold_bytes=3 * PAGE)
    space = world.open()
    world.put(space, chain(8))
    world.save_all()
    assert world.cache.evict(COLD, 3 * PAGE) == (3, 3 * PAGE)
    check(world)
    assert world.save_all() == 3


def test_the_last_child_gone_its_parent_may_leave(world: World) -> None:
    """The child was in cold only; nothing in warm changed, and yet the parent is free to go now."""
    space = world.open()
    world.put(space, chain(2))
    parent, child = (space.blocks[name] for name in chain(2))
    saves = {save.copy.block: save for save in world.start_saves()}
    world.end_save(saves[child])
    world.end_save(saves[parent], None)
    world.cache.evict(WARM, PAGE)
    assert (tiers_of(parent), tiers_of(child)) == ("warm", "cold")
    assert world.cache.evict(WARM, PAGE) == (0, 0)  # it would leave a hole
    assert world.cache.evict(COLD, PAGE) == (1, PAGE)
    check(world)
    assert world.cache.evict(WARM, PAGE) == (1, PAGE)


# -- clear ----------------------------------------------------------------------------------------------------


def test_a_clear_is_emptied_piece_by_piece(world: World) -> None:
    space = world.open()
    world.put(space, chain(8))
    world.save_all()
    world.cache.clear(space)
    assert world.match(space, chain(8)) == 0
    assert world.cache.moves.reap(3)
    assert len(slots_of(world)) == 5
    check(world)
    assert not world.cache.moves.reap(6)  # five, and to see that there are no more
    assert slots_of(world) == [] and not all_blocks(world)
    world.delete_all()
    check_media(world)


def test_reaping_takes_no_more_than_it_was_told(world: World) -> None:
    for name in ("a", "b"):
        space = world.open(name)
        world.put(space, chain(3))
        world.cache.clear(space)
    assert world.cache.moves.reap(4)
    assert len(slots_of(world)) == 2
    assert world.cache.moves.reap(0)
    assert not world.cache.moves.reap(100)
    assert not world.cache.moves.reap(100)
    check(world)


def test_a_clear_is_emptied_from_the_leaves_on(world: World) -> None:
    """Whatever the order of its shards: a parent that went first would make orphans of all below it at once."""
    space = world.open()
    for name in ("a", "b", "c"):
        world.put(space, chain(2) + chain(1, name), b"")
    blocks = list(space.blocks.values())
    world.cache.clear(space)
    while world.cache.moves.reap(1):
        assert not any(block.orphan for block in blocks)
    assert world.cache.index.orphans == 0 and not any(block.copies for block in blocks)


def test_clearing_what_is_empty_condemns_nothing(world: World) -> None:
    space = world.open()
    assert world.cache.clear(space) == 1
    assert not world.cache.moves.reap(1)


def test_cleared_blocks_are_not_saved(world: World) -> None:
    """They would be written under the new epoch, and served after a restart: the bytes of older weights."""
    space = world.open()
    world.put(space, chain(6))
    world.cache.clear(space)
    world.put(space, chain(2), variant=1)
    assert world.start_saves() == []
    while world.cache.moves.reap(2):
        assert world.start_saves() == []
    assert world.save_all() == 2
    check(world)
    check_media(world)


def test_a_save_over_a_clear_keeps_the_epoch_of_its_bytes(world: World) -> None:
    space = world.open()
    world.put(space, chain(1))
    (copy,) = world.cache.moves.begin_saves(1, PAGE, newest_first=True)
    world.cache.clear(space)
    assert (copy.block.epoch, space.epoch) == (0, 1)
    world.cache.moves.saved(copy, PAGE)
    world.cache.moves.reap(9)
    assert world.cache.residency.deletes[COLD] == [(space.digest, chain(1)[0])]


def test_emptying_a_clear_does_not_delete_newer_copies_of_the_same_keys(world: World) -> None:
    space = world.open()
    world.put(space, chain(4))
    world.save_all()
    world.cache.clear(space)
    world.put(space, chain(4), variant=1)
    while True:
        for save in world.start_saves():
            world.end_save(save)
        if not world.cache.moves.reap(1) and not world.cache.residency.dirty:
            break
    world.delete_all()
    assert names_of(space, COLD) == set(chain(4))
    check(world)
    check_media(world)


@pytest.mark.parametrize("reaped", [False, True])
def test_a_save_over_a_clear_leaves_nothing_in_cold(world: World, reaped: bool) -> None:
    space = world.open()
    world.put(space, chain(2))
    saves = world.start_saves()
    world.cache.clear(space)
    if reaped:
        world.cache.moves.reap(9)
    for save in saves:
        world.end_save(save)
        check(world)
    world.cache.moves.reap(9)
    world.delete_all()
    check(world)
    check_media(world)
