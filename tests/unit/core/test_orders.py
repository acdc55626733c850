"""Who goes before whom across the orders: levels first, then age; and who makes room for whom."""

from __future__ import annotations

from core_checks import check
from core_world import PAGE, World, chain, tiers_of, warm_bytes_for
from kvstore.core.block import COLD, HIGH, LOW, PINNED, WARM, standing_of
from kvstore.core.fair import payers


def test_a_lower_level_leaves_first_whatever_its_age() -> None:
    world = World(warm_bytes_for(8))
    space = world.open()
    for number in range(4):
        world.put(space, chain(1, number))
    blocks = [space.blocks[chain(1, number)[0]] for number in range(4)]
    for block, level in zip(blocks, (PINNED, HIGH, LOW), strict=False):
        world.cache.residency.orders.set_standing(block, standing_of(level))
    left = []
    while world.cache.evict(WARM, PAGE)[0]:
        left += [number for number in range(4) if not blocks[number].copies and number not in left]
        check(world)
    assert left == [2, 3, 1, 0], "low, normal, high, pinned"


def test_a_new_block_of_low_priority_drives_nothing_better_out() -> None:
    world = World(warm_bytes_for(2))
    space = world.open()
    low = world.open("low")
    low.standing = standing_of(LOW)
    for number in range(2):
        world.put(space, chain(1, number))
    assert world.put(low, chain(1, "low")) == ["NOT_ADMITTED"]
    assert all(block.copies for block in space.blocks.values())


def test_what_is_read_once_from_cold_leaves_before_what_has_a_place() -> None:
    world = World(warm_bytes_for(8), cold_bytes=64 * PAGE)
    space = world.open()
    world.put(space, chain(2, "cold"))
    world.save_all()
    world.cache.evict(WARM, 2 * PAGE)
    for number in range(6):
        world.put(space, chain(1, number))
    lease = world.lease(space, chain(2, "cold"))
    world.load_all()
    world.release(lease)
    for number in range(6, 8):
        world.put(space, chain(1, number))
    assert all(space.blocks[chain(1, number)[0]].copies & WARM for number in range(8))
    assert [tiers_of(space.blocks[name]) for name in chain(2, "cold")] == ["cold", "cold"]
    check(world)


def test_the_second_hit_earns_a_place_and_frees_the_copy_below() -> None:
    world = World(warm_bytes_for(8), cold_bytes=64 * PAGE)
    space = world.open()
    world.put(space, chain(2))
    world.save_all()
    world.cache.evict(WARM, 2 * PAGE)
    for _ in range(2):
        lease = world.lease(space, chain(2))
        world.load_all()
        world.release(lease)
    assert world.cache.residency.counts[WARM].promotions == 2
    root, leaf = (space.blocks[name] for name in chain(2))
    assert root.spare & COLD and leaf.spare & COLD
    assert world.cache.evict(COLD, PAGE)[0] == 1
    assert (root.copies | leaf.copies) & COLD and world.match(space, chain(2)) == 2
    check(world)


def test_one_tenant_cannot_push_another_below_an_equal_share_of_cold() -> None:
    world = World(warm_bytes=2 * warm_bytes_for(8), slab_bytes=8 * PAGE, cold_bytes=8 * PAGE)
    quiet, loud = world.open("quiet", "a"), world.open("loud", "b")
    for number in range(4):
        world.put(quiet, chain(1, number))
    world.save_all()
    world.cache.evict(WARM, 4 * PAGE)
    for number in range(40):
        world.put(loud, chain(1, number))
        world.save_all()
        world.cache.evict(WARM, PAGE)
        check(world)
    assert sum(bool(block.copies & COLD) for block in quiet.blocks.values()) == 4
    assert sum(bool(block.copies & COLD) for block in loud.blocks.values()) == 4


def test_payers_are_the_largest_and_nobody_below_an_equal_share() -> None:
    assert payers({"a": 90, "b": 10}, 100, "b", 10) == ["a", "b"]
    assert payers({"a": 50, "b": 50}, 100, "a", 10) == ["a"]
    assert payers({"a": 100}, 100, "b", 10) == ["a", "b"]
    assert payers({}, 100, "a", 10) == ["a"]
