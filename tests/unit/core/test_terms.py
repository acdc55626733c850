"""Priority, time to live and limits of namespaces, and soft pins: what leaves, and what stays."""

from __future__ import annotations

import pytest

from core_checks import check
from core_world import PAGE, World, chain, key, tiers_of, warm_bytes_for
from kvstore.core import terms
from kvstore.core.block import COLD, HIGH, LOW, NORMAL, SHARDS, WARM, Namespace
from kvstore.core.terms import Terms, pin


@pytest.fixture
def world() -> World:
    return World(warm_bytes_for(8))


def treat(world: World, space: Namespace, **said: object) -> None:
    world.cache.terms.set(space, Terms(**said))  # type: ignore[arg-type]


def names(space: Namespace, *candidates: str) -> str:
    """Which of these are stored, as single blocks by their names."""
    return "".join(name for name in candidates if key((name, 0)) in space.blocks)


def put_each(world: World, space: Namespace, *blocks: str) -> list[str]:
    return [outcome for name in blocks for outcome in world.put(space, chain(1, name))]


# -- priority -------------------------------------------------------------------------------------------------


def test_lower_priority_leaves_first_whatever_its_age(world: World) -> None:
    low, high = world.open("low"), world.open("high")
    treat(world, low, level=LOW)
    treat(world, high, level=HIGH)
    put_each(world, high, *"abcd")
    put_each(world, low, *"abcd")
    put_each(world, high, *"efg")
    assert names(low, *"abcd") == "d"
    assert names(high, *"abcdefg") == "abcdefg"
    check(world)


def test_what_is_of_lower_priority_takes_no_room_from_higher(world: World) -> None:
    low, high = world.open("low"), world.open("high")
    treat(world, low, level=LOW)
    put_each(world, high, *"abcdefgh")
    assert put_each(world, low, "x") == ["NOT_ADMITTED"]
    assert names(high, *"abcdefgh") == "abcdefgh"
    check(world)


def test_a_new_priority_holds_for_what_is_stored_already(world: World) -> None:
    first, second = world.open("first"), world.open("second")
    put_each(world, first, *"abcd")
    put_each(world, second, *"abcd")
    treat(world, first, level=HIGH)
    world.keep_terms()
    assert {block.level for block in first.blocks.values()} == {HIGH}
    put_each(world, second, *"efg")
    assert (names(first, *"abcd"), names(second, *"abcdefg")) == ("abcd", "defg")
    check(world)


def test_one_tenants_priority_is_no_burden_on_another() -> None:
    world = World(2 * warm_bytes_for(4), slab_bytes=warm_bytes_for(4))
    mine, other = world.open("mine", "me"), world.open("other", "you")
    treat(world, mine, level=HIGH)
    put_each(world, mine, *"abc")
    put_each(world, other, *"abc")
    world.cache.evict(WARM, 2 * PAGE)
    assert (names(mine, *"abc"), names(other, *"abc")) == ("c", "abc"), "between tenants only age counts"
    check(world)


# -- pins -----------------------------------------------------------------------------------------------------


def test_what_is_pinned_leaves_last_and_what_it_hangs_on_stays(world: World) -> None:
    space = world.open()
    world.put(space, chain(3, "p"))
    pin(world.cache.residency, space.blocks[chain(3, "p")[2]], pinned=True)
    put_each(world, space, *"abcdefghijkl")
    assert world.match(space, chain(3, "p")) == 3
    check(world)
    pin(world.cache.residency, space.blocks[chain(3, "p")[2]], pinned=False)
    put_each(world, space, *"stuvwxyz")
    assert world.match(space, chain(3, "p")) == 0
    check(world)


def test_a_pin_is_soft(world: World) -> None:
    space = world.open()
    world.put(space, chain(8, "p"), pin=True)
    assert world.put(space, chain(1, "x")) == ["NOT_ADMITTED"]
    assert world.cache.evict(WARM, PAGE) == (1, PAGE)
    assert world.match(space, chain(8, "p")) == 7
    check(world)


def test_a_put_pins_its_last_block_once_all_are_stored(world: World) -> None:
    space = world.open()
    keys = chain(3, "p")
    assert world.put(space, keys[:2]) == ["STORED"] * 2
    assert world.put(space, keys, pin=True) == ["EXISTS", "EXISTS", "STORED"]
    world.put(space, chain(3, "q"))
    plan = world.begin(space, chain(5, "q"), pin=True)
    world.copy(plan, stop=4)
    assert world.finish(plan) == ["EXISTS"] * 3 + ["STORED", "DEADLINE"]
    put_each(world, space, *"abcdefghijkl")
    assert world.match(space, keys) == 3
    assert world.match(space, chain(4, "q")) == 0, "not all of it was stored"
    check(world)


def test_a_put_into_a_set_pins_each(world: World) -> None:
    space = world.open(chain=False)
    world.put(space, chain(3, "p"), pin=True)
    for i in range(12):
        world.put(space, [key(("x", i))])
    assert world.exists(space, chain(3, "p")) == [True] * 3
    check(world)


def test_a_pinned_block_on_its_way_out_stays_after_all() -> None:
    world = World(warm_bytes_for(8), cold_bytes=64 * PAGE)
    space = world.open()
    put_each(world, space, *"abcdefgh")
    world.save_all()
    world.cache.moves.let_leave(4 * PAGE)
    block = space.blocks[key(("a", 0))]
    assert block.spare & WARM
    pin(world.cache.residency, block, pinned=True)
    put_each(world, space, *"ijklmno")
    assert tiers_of(block) == "warm cold" and not block.spare & WARM
    check(world)


def test_a_pin_survives_that_its_copy_is_loading() -> None:
    world = World(warm_bytes_for(8), cold_bytes=64 * PAGE)
    space = world.open()
    world.put(space, chain(2))
    world.save_all()
    world.cache.evict(WARM, 1 << 40)
    lease = world.lease(space, chain(2))
    block = space.blocks[chain(2)[1]]
    pin(world.cache.residency, block, pinned=True)
    world.load_all()
    world.release(lease)
    put_each(world, space, *"abcdefghij")
    assert block.copies & WARM
    check(world)


# -- time to live ---------------------------------------------------------------------------------------------


def pass_time(world: World, seconds: float, *, step_s: float = 1.0) -> int:
    expired = 0
    for _ in range(round(seconds / step_s)):
        world.now_s += step_s
        expired += world.keep_terms()
    return expired


def test_blocks_go_that_nobody_used_for_so_long(world: World) -> None:
    space, other = world.open("space"), world.open("other")
    treat(world, space, ttl_s=60.0)
    world.put(space, chain(3, "p"))
    world.put(other, chain(2, "p"))
    assert pass_time(world, 59.0) == 0
    assert pass_time(world, 10.0) == 3
    assert not space.blocks and world.match(other, chain(2, "p")) == 2
    check(world)


def test_a_use_of_a_prefix_is_a_use_of_all_of_it(world: World) -> None:
    space = world.open()
    treat(world, space, ttl_s=60.0)
    world.put(space, chain(4, "p"))
    pass_time(world, 50.0)
    assert world.match(space, chain(2, "p")) == 2
    assert pass_time(world, 20.0) == 2
    assert world.match(space, chain(4, "p")) == 2
    assert pass_time(world, 70.0) == 2
    check(world)


def test_every_tiers_copy_goes() -> None:
    world = World(warm_bytes_for(8), cold_bytes=64 * PAGE)
    space = world.open()
    treat(world, space, ttl_s=60.0)
    world.put(space, chain(4, "p"))
    world.save_all()
    world.cache.evict(WARM, 2 * PAGE)
    assert pass_time(world, 70.0) == 4
    assert sorted(world.cache.residency.deletes[COLD]) == sorted((space.digest, name) for name in chain(4, "p"))
    check(world)


def test_what_is_leased_or_pinned_does_not_expire(world: World) -> None:
    space = world.open()
    treat(world, space, ttl_s=60.0)
    world.put(space, chain(2, "leased"))
    world.put(space, chain(2, "pinned"), pin=True)
    lease = world.lease(space, chain(2, "leased"))
    assert pass_time(world, 200.0) == 0
    world.release(lease)
    assert pass_time(world, 20.0) == 2
    assert world.match(space, chain(2, "pinned")) == 2
    check(world)


def test_a_long_prefix_expires_in_parts_and_whole() -> None:
    world = World(warm_bytes_for(1100))
    space = world.open()
    treat(world, space, ttl_s=60.0)
    assert world.put(space, chain(1000, "p")) == ["STORED"] * 1000
    world.cache.terms.tick(world.now_s)
    world.now_s += 61.0
    world.cache.terms.tick(world.now_s)
    steps = []
    while True:
        before = len(space.blocks)
        if not world.cache.terms.step(world.now_s):
            break
        steps.append(before - len(space.blocks))
    assert sum(steps) == 1000 and max(steps) <= 128, "the lock is held for a part at a time"
    check(world)


def test_a_time_to_live_that_ends_ends_it(world: World) -> None:
    space = world.open()
    treat(world, space, ttl_s=60.0)
    world.put(space, chain(2, "p"))
    pass_time(world, 50.0)
    treat(world, space)
    assert pass_time(world, 200.0) == 0
    assert world.match(space, chain(2, "p")) == 2


# -- limits ---------------------------------------------------------------------------------------------------


def test_a_namespace_makes_room_for_itself_within_its_limit(world: World) -> None:
    space, other = world.open("space"), world.open("other")
    treat(world, space, limits={WARM: 3 * PAGE})
    put_each(world, other, *"abcd")
    assert put_each(world, space, *"abcde") == ["STORED"] * 5
    assert (names(space, *"abcde"), names(other, *"abcd")) == ("cde", "abcd")
    check(world)


def test_a_batch_makes_room_for_itself_too(world: World) -> None:
    space, other = world.open("space"), world.open("other")
    treat(world, space, limits={WARM: 4 * PAGE})
    put_each(world, other, *"abcd")
    for name in "pqr":
        assert world.put(space, chain(3, name)) == ["STORED"] * 3
    assert names(other, *"abcd") == "abcd"
    assert (world.match(space, chain(3, "q")), world.match(space, chain(3, "r"))) == (1, 3)
    check(world)


def test_more_than_its_limit_is_stored_in_part(world: World) -> None:
    space = world.open()
    treat(world, space, limits={WARM: 3 * PAGE})
    assert world.put(space, chain(5, "p")) == ["STORED"] * 3 + ["QUOTA", "NO_PARENT"]
    check(world)


def test_others_may_push_out_what_is_within_its_limit(world: World) -> None:
    space, other = world.open("space"), world.open("other")
    treat(world, space, limits={WARM: 6 * PAGE})
    put_each(world, space, *"abcd")
    put_each(world, other, *"abcdefgh")
    assert (names(space, *"abcd"), names(other, *"abcdefgh")) == ("", "abcdefgh")
    check(world)


def test_a_limit_in_cold() -> None:
    world = World(warm_bytes_for(8), cold_bytes=64 * PAGE)
    space, other = world.open("space"), world.open("other")
    treat(world, space, limits={COLD: 2 * PAGE})
    put_each(world, other, *"abcd")
    put_each(world, space, *"abcd")
    world.save_all()
    world.cache.evict(WARM, 1 << 40)
    assert world.cache.residency.budgets[COLD].by_namespace == {space: 2 * PAGE, other: 4 * PAGE}
    check(world)


@pytest.mark.parametrize("tier", [WARM, COLD])
def test_a_limit_below_what_is_there_takes_it_away(tier: int) -> None:
    world = World(warm_bytes_for(400), cold_bytes=800 * PAGE)
    space, other = world.open("space"), world.open("other")
    for i in range(300):
        world.put(space, chain(1, i))
    put_each(world, other, *"abcd")
    world.save_all()
    treat(world, space, limits={tier: 10 * PAGE})
    world.keep_terms()
    assert world.cache.residency.budgets[tier].by_namespace[space] == 10 * PAGE
    assert world.cache.residency.budgets[tier].by_namespace[other] == 4 * PAGE
    check(world)


def test_a_limit_that_is_lifted_is_forgotten(world: World) -> None:
    space = world.open()
    treat(world, space, limits={WARM: 2 * PAGE})
    put_each(world, space, *"ab")
    treat(world, space)
    assert put_each(world, space, *"cdef") == ["STORED"] * 4
    assert names(space, *"abcdef") == "abcdef"
    check(world)


@pytest.mark.parametrize("tier", [WARM, COLD])
def test_a_limit_that_is_lifted_and_set_again(tier: int) -> None:
    """Regression: what had been in the first order of its own was not entered into the second, and never left."""
    world = World(warm_bytes_for(8), cold_bytes=64 * PAGE)
    space = world.open()
    for limit in (4, 0, 4, 0, 3):
        treat(world, space, limits={tier: limit * PAGE})
        world.keep_terms()
        assert set(put_each(world, space, *"abcdef")) <= {"STORED", "EXISTS"}
        world.save_all()
        world.keep_terms()
        check(world)
    assert world.cache.residency.budgets[tier].by_namespace[space] == 3 * PAGE
    world.cache.delete(space, b"".join(key((name, 0)) for name in "abcdef"))
    check(world)


@pytest.mark.parametrize("clear", [False, True])
def test_what_comes_and_goes_while_blocks_move(world: World, monkeypatch: pytest.MonkeyPatch, clear: bool) -> None:
    """A limit set beside blocks that are stored: they move into a group of their own in parts."""
    monkeypatch.setattr(terms, "_LOOKS", 1)
    space = world.open()
    put_each(world, space, *"abcdef")
    treat(world, space, limits={WARM: 4 * PAGE})
    for _ in range(SHARDS // 2):
        assert world.cache.terms.step(world.now_s)
    check(world)
    world.cache.delete(space, key(("a", 0)))
    world.put(space, chain(1, "g"))
    if clear:
        world.cache.clear(space)
        put_each(world, space, *"abcdef")
    world.keep_terms()
    assert world.cache.residency.budgets[WARM].by_namespace[space] == 4 * PAGE or clear
    while world.cache.moves.reap(1):
        check(world)
    world.keep_terms()
    assert 0 < world.cache.residency.budgets[WARM].by_namespace[space] <= 4 * PAGE
    check(world)
    world.cache.evict(WARM, 1 << 40)
    assert not space.blocks
    check(world)


def test_a_pin_in_a_limited_namespace_leaves_the_others_room(world: World) -> None:
    space = world.open()
    treat(world, space, limits={WARM: 4 * PAGE})
    world.put(space, chain(1, "pinned"), pin=True)
    assert put_each(world, space, *"abcdefgh") == ["STORED"] * 8
    assert names(space, "pinned", *"fgh") == "pinnedfgh"
    check(world)


def test_a_limited_namespace_saves_before_it_drops() -> None:
    world = World(warm_bytes_for(100), cold_bytes=200 * PAGE)
    space = world.open()
    treat(world, space, limits={WARM: 10 * PAGE})
    for i in range(50):
        assert world.put(space, chain(1, i)) == ["STORED"]
        world.save(8)
    assert world.cache.residency.dropped_unsaved == 0
    assert world.cache.residency.counts[COLD].blocks >= 40
    check(world)


def test_a_lower_limit_saves_what_it_takes_away() -> None:
    world = World(warm_bytes_for(100), cold_bytes=200 * PAGE)
    space = world.open()
    for i in range(50):
        world.put(space, chain(1, i))
    treat(world, space, limits={WARM: 10 * PAGE})
    for _ in range(10):
        world.keep_terms()
        world.save(8)
    world.keep_terms()
    assert world.cache.residency.budgets[WARM].by_namespace[space] == 10 * PAGE
    assert world.cache.residency.dropped_unsaved == 0 and world.cache.residency.counts[COLD].blocks >= 40
    check(world)


def test_a_limit_that_leases_keep_from_being_reached_is_reached_after_them(world: World) -> None:
    space = world.open()
    world.put(space, chain(6))
    lease = world.lease(space, chain(6))
    treat(world, space, limits={WARM: 2 * PAGE})
    world.keep_terms()
    assert world.cache.residency.budgets[WARM].by_namespace[space] == 6 * PAGE
    world.release(lease)
    world.keep_terms()
    assert world.cache.residency.budgets[WARM].by_namespace[space] == 2 * PAGE
    check(world)


def test_a_full_cold_limit_keeps_nobody_else_from_being_saved() -> None:
    world = World(warm_bytes_for(100), cold_bytes=200 * PAGE)
    limited, other = world.open("limited"), world.open("other")
    treat(world, limited, limits={COLD: 2 * PAGE})
    for i in range(20):
        world.put(other, chain(1, i))
    for i in range(70):
        world.put(limited, chain(1, i))
    world.save_all()
    assert world.cache.residency.budgets[COLD].by_namespace == {limited: 2 * PAGE, other: 20 * PAGE}
    check(world)


def test_a_chain_grows_past_its_limit_in_warm_where_cold_has_its_beginning() -> None:
    world = World(warm_bytes_for(20), cold_bytes=200 * PAGE)
    space = world.open()
    treat(world, space, limits={WARM: 4 * PAGE})
    keys = chain(12)
    for i in range(12):
        assert world.put(space, keys[i : i + 1], keys[i - 1] if i else b"") == ["STORED"]
        world.save_all()
    assert world.match(space, keys) == 12
    check(world)


# -- beside a cold tier ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 20])
def test_low_priority_takes_no_room_from_high_beside_a_cold_tier(blocks: int) -> None:
    world = World(warm_bytes_for(100), cold_bytes=1000 * PAGE)
    low, high = world.open("low"), world.open("high")
    treat(world, low, level=LOW)
    treat(world, high, level=HIGH)
    for i in range(80):
        world.put(high, chain(1, i))
    for i in range(60):
        world.put(low, chain(blocks, i))
        world.save(8)
    assert sum(bool(block.copies & WARM) for block in high.blocks.values()) == 80
    check(world)


def test_what_is_pinned_stays_in_warm_beside_a_cold_tier() -> None:
    world = World(warm_bytes_for(100), cold_bytes=1000 * PAGE)
    space = world.open()
    for i in range(90):
        world.put(space, chain(1, f"pinned {i}"), pin=True)
    for i in range(60):
        world.put(space, chain(1, i))
        world.save(8)
    kept = [space.blocks[key((f"pinned {i}", 0))] for i in range(90)]
    assert all(block.copies & WARM for block in kept)
    check(world)


def test_another_block_size_takes_no_slab_with_pins() -> None:
    world = World(4 * warm_bytes_for(8), slab_bytes=warm_bytes_for(8))
    space, wide = world.open("space"), world.open("wide", nbytes=2 * PAGE)
    world.put(wide, chain(1, "wide"))
    for i in range(16):
        world.put(space, chain(1, i), pin=i % 4 == 0)
    for i in range(100):
        world.put(wide, chain(2, i))
        borrower = (wide.tenant, wide.slot_bytes)
        if (lender := world.cache.residency.lending.lender(borrower)) is not None:
            slab = world.cache.residency.lending.reclaim_slab(*borrower, lender)
            if slab is not None:
                world.cache.allocator.retired(slab)
    assert all(space.blocks[key((i, 0))].copies & WARM for i in range(0, 16, 4))
    check(world)


# -- many of them ---------------------------------------------------------------------------------------------


def test_no_namespace_keeps_another_from_its_turn() -> None:
    """Regression: a short time to live took every step there was, and the others never expired."""
    world = World(warm_bytes_for(200))
    spaces = [world.open(f"space {i}") for i in range(30)]
    for i, space in enumerate(spaces):
        treat(world, space, ttl_s=2.0 if i < 5 else 600.0)
        world.put(space, chain(4))
    late = world.open("late")
    world.put(late, chain(4))
    treat(world, late, level=HIGH)
    for _ in range(660):
        world.now_s += 1.0
        world.cache.terms.tick(world.now_s)
        for _ in range(16):
            world.cache.terms.step(world.now_s)
    assert [len(space.blocks) for space in spaces] == [0] * 30
    assert {block.level for block in late.blocks.values()} == {HIGH}


def test_a_changed_time_to_live_remembers_what_was_used_when(world: World) -> None:
    space = world.open()
    treat(world, space, ttl_s=3600.0)
    world.put(space, chain(2))
    pass_time(world, 3500.0, step_s=10.0)
    for ttl_s in (1800.0, 2400.0, 1800.0):
        treat(world, space, ttl_s=ttl_s)
    assert pass_time(world, 120.0, step_s=10.0) == 2


def test_blocks_that_are_found_again_live_on() -> None:
    world = World(warm_bytes_for(20), cold_bytes=200 * PAGE)
    space = world.open()
    treat(world, space, ttl_s=60.0)
    pass_time(world, 5.0)
    world.put(space, chain(4))
    world.save_all()
    world.cache.evict(WARM, 1 << 40)
    world.cache.residency.drop_below(space.blocks[chain(4)[0]], COLD)
    world.cache.index.lost(space.blocks[chain(4)[0]])
    assert world.match(space, chain(4)) == 0
    world.put(space, chain(1))
    assert world.match(space, chain(4)) == 4
    assert pass_time(world, 40.0) == 0
    check(world)


def test_a_hole_that_is_filled_is_not_pinned_any_more() -> None:
    world = World(warm_bytes_for(20), cold_bytes=200 * PAGE)
    space = world.open()
    world.put(space, chain(2))
    world.save_all()
    root = space.blocks[chain(2)[0]]
    pin(world.cache.residency, root, pinned=True)
    world.cache.residency.forget(root)
    world.put(space, chain(1))
    assert root.level == NORMAL and world.match(space, chain(2)) == 2
    check(world)


def test_terms_that_say_nothing_cost_nothing(world: World) -> None:
    space = world.open()
    treat(world, space, level=NORMAL)
    assert not world.cache.terms.step(world.now_s)
