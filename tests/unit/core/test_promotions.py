"""Promotions: copies to the hot tier, their room, and what becomes of them when the block or the tier goes."""

from __future__ import annotations

import pytest

from core_checks import check, check_media, slots_of
from core_world import PAGE, Answer, World, chain, key, tiers_of
from kvstore.core.block import COLD, HOT, WARM, Namespace
from kvstore.core.slots import SlotState


@pytest.fixture
def world() -> World:
    """Eight slots of warm, plenty of cold, no hot."""
    return World(cold_bytes=64 * PAGE)


def names_of(space: Namespace, tier: int) -> set[bytes]:
    return {name for name, block in space.blocks.items() if block.copies & tier}


# -- hot ------------------------------------------------------------------------------------------------------


def hot_world(hot_blocks: int = 4) -> World:
    return World(cold_bytes=64 * PAGE, hot_bytes=hot_blocks * PAGE, promote_hits=1)


def use(world: World, space: Namespace, keys: list[bytes]) -> None:
    lease = world.lease(space, keys)
    world.load_all()
    world.release(lease)


def test_promotions_keep_to_the_hot_tiers_room() -> None:
    world = hot_world(3)
    space = world.open()
    world.put(space, chain(8))
    use(world, space, chain(8))
    batch = world.start_promotions(8)
    assert len(batch) == 3
    check(world)
    for save in batch:
        world.end_save(save)
    check(world)


def test_a_hot_tier_that_turns_out_smaller_lets_its_least_used_blocks_go() -> None:
    world = hot_world(6)
    space = world.open()
    world.put(space, chain(6))
    use(world, space, chain(6))
    assert world.promote_all() == 6
    world.cache.resize(HOT, 4 * PAGE)
    check(world)
    assert len(names_of(space, HOT)) == 4
    assert len(world.cache.residency.deletes[HOT]) == 2, "the medium is told"
    world.cache.resize(HOT, 5 * PAGE)
    assert world.cache.residency.budgets[HOT].free_bytes == PAGE


def test_room_for_large_blocks_in_a_batch_of_promotions_is_not_counted_as_small() -> None:
    world = World(warm_bytes=40 * PAGE, slab_bytes=10 * PAGE, hot_bytes=8 * PAGE, promote_hits=1)
    large, small = world.open("large", nbytes=3 * PAGE), world.open("small")
    world.put(large, chain(2, "large"))
    world.put(small, chain(4))
    use(world, large, chain(2, "large"))
    use(world, small, chain(4))
    for save in world.start_promotions(6):
        world.end_save(save)
        check(world)
    assert world.cache.residency.budgets[HOT].used_bytes == 8 * PAGE


def test_a_block_is_not_promoted_twice_at_once() -> None:
    world = hot_world()
    space = world.open()
    world.put(space, chain(1))
    use(world, space, chain(1))
    (save,) = world.start_promotions()
    use(world, space, chain(1))
    assert world.start_promotions() == []
    world.end_save(save)
    use(world, space, chain(1))
    assert world.start_promotions() == []
    check(world)


def test_a_promotion_that_failed_gives_its_room_back() -> None:
    world = hot_world()
    space = world.open()
    world.put(space, chain(4))
    use(world, space, chain(4))
    for save in world.start_promotions():
        world.end_save(save, None)
    assert world.cache.residency.budgets[HOT].used_bytes == 0
    assert world.cache.residency.counts[HOT].write_failures == 4
    use(world, space, chain(4))
    assert world.promote_all() == 4
    check(world)


@pytest.mark.parametrize("end", ["delete", "clear", "put again"])
def test_a_promotion_whose_block_has_gone_is_deleted_from_hot(end: str) -> None:
    world = hot_world()
    space = world.open()
    world.put(space, chain(1))
    use(world, space, chain(1))
    (save,) = world.start_promotions()
    if end == "clear":
        world.cache.clear(space)
    else:
        world.cache.delete(space, chain(1)[0])
    if end == "put again":
        world.put(space, chain(1), variant=1)
    world.end_save(save)
    world.cache.moves.reap(9)
    world.delete_all()
    check(world)
    check_media(world)


def test_a_hole_filled_again_while_it_is_promoted_keeps_its_own_bytes() -> None:
    world = hot_world()
    space = world.open()
    world.put(space, chain(2))
    use(world, space, chain(1))
    (save,) = world.start_promotions()
    parent = space.blocks[chain(1)[0]]
    world.cache.residency.drop_warm(parent)  # proved corrupt
    world.cache.index.lost(parent)
    assert world.put(space, chain(1), variant=1) == ["STORED"]
    world.end_save(save)
    assert tiers_of(parent) == "warm"
    world.delete_all()
    check(world)
    check_media(world)


def test_emptying_a_clear_does_not_delete_newer_hot_copies_of_the_same_keys() -> None:
    world = hot_world(8)
    space = world.open()
    world.put(space, chain(3))
    use(world, space, chain(3))
    assert world.promote_all() == 3
    world.cache.clear(space)
    world.put(space, chain(3), variant=1)
    use(world, space, chain(3))
    promoted = world.promote_all()
    while world.cache.moves.reap(1):
        promoted += world.promote_all()
    world.delete_all()
    assert promoted + world.promote_all() == 3
    check(world)
    check_media(world)


def test_what_is_only_being_filled_is_not_promoted() -> None:
    world = hot_world()
    space = world.open()
    world.put(space, chain(1))
    world.save_all()
    world.cache.evict(WARM, PAGE)
    lease = world.lease(space, chain(1))
    assert world.start_promotions() == []
    world.load_all()
    world.release(lease)
    use(world, space, chain(1))
    assert world.promote_all() == 1
    check(world)


def test_a_hot_tier_that_was_lost_leaves_the_other_copies() -> None:
    world = hot_world()
    space = world.open()
    world.put(space, chain(4))
    use(world, space, chain(4))
    world.promote_all()
    for name in chain(4)[::-1]:
        world.cache.residency.evict_warm(space.blocks[name])
    world.put(space, chain(2, "b"))
    use(world, space, chain(2, "b"))
    assert world.promote_all() == 2
    assert names_of(space, HOT) == {*chain(2), *chain(2, "b")}
    world.lose_tier(HOT)
    check(world)
    assert names_of(space, HOT) == set()
    assert (world.match(space, chain(4)), world.match(space, chain(2, "b"))) == (0, 2)
    assert world.cache.residency.budgets[HOT].used_bytes == 0


def test_a_hot_tier_that_is_lost_while_it_is_read() -> None:
    world = hot_world()
    space = world.open()
    world.put(space, chain(2))
    use(world, space, chain(2))
    world.promote_all()
    for name in chain(2)[::-1]:
        world.cache.residency.evict_warm(space.blocks[name])
    lease = world.lease(space, chain(2))
    loads = [world.start_load(), world.start_load()]
    world.lose_tier(HOT)
    check(world)
    for load in loads:
        assert load is not None
        world.end_load(load, Answer.MISSING)
        check(world)
    world.release(lease)
    assert not space.blocks


def test_a_promotion_that_ends_after_the_tier_was_lost_counts_for_nothing() -> None:
    world = hot_world()
    space = world.open()
    world.put(space, chain(1))
    use(world, space, chain(1))
    (save,) = world.start_promotions()
    world.lose_tier(HOT)
    world.end_save(save)
    assert tiers_of(space.blocks[chain(1)[0]]) == "warm"
    check(world)


def test_a_block_evicted_from_hot_alone_is_still_in_warm() -> None:
    world = hot_world(1)
    space = world.open()
    for name in "ab":
        world.put(space, [key(name)])
        use(world, space, [key(name)])
        world.promote_all()
    assert [tiers_of(space.blocks[key(name)]) for name in "ab"] == ["warm", "hot warm"]
    assert slots_of(world)[0].state is SlotState.READY
    check(world)
    check_media(world)


def test_warm_that_is_saved_may_leave_in_any_tier_order() -> None:
    world = hot_world()
    space = world.open()
    world.put(space, chain(3))
    use(world, space, chain(3))
    world.promote_all()
    world.save_all()
    for tier in (WARM, HOT, COLD):
        assert world.cache.evict(tier, 3 * PAGE)[0] == 3
        check(world)
    assert not space.blocks
