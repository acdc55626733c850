"""The core as a whole: namespaces, deleting, clearing, restarting, and everything given back at the end."""

from __future__ import annotations

import random

import pytest

from core_checks import check, check_media, check_nothing_left, slots_of
from core_world import PAGE, TENANT, Answer, World, chain, key, packed, promises
from kvstore.core import cache as cache_module
from kvstore.core.block import COLD, HOT, WARM
from kvstore.core.cache import NamespaceShape, RecoveredBlock
from kvstore.protocol.errors import InvalidRequest, NotFound, QuotaExceeded


@pytest.fixture
def world() -> World:
    return World(cold_bytes=64 * PAGE)


# -- namespaces -----------------------------------------------------------------------------------------------


def test_a_namespace_is_made_once(world: World) -> None:
    space = world.open("a")
    assert world.open("a") is space
    assert world.open("b") is not space
    assert world.cache.namespace(space.digest, TENANT) is space


def test_a_namespace_of_another_tenant_is_unknown(world: World) -> None:
    space = world.open("a")
    with pytest.raises(NotFound, match="open it first"):
        world.cache.namespace(space.digest, "stranger")
    with pytest.raises(NotFound, match="open it first"):
        world.cache.namespace(key("never opened"), TENANT)


def test_a_block_that_can_never_fit_is_refused_when_its_namespace_is_opened(world: World) -> None:
    with pytest.raises(InvalidRequest, match="does not fit the warm tier"):
        world.open("huge", nbytes=9 * PAGE)
    assert world.open("largest", nbytes=7 * PAGE).slot_bytes == 7 * PAGE


def test_slots_are_whole_pages(world: World) -> None:
    assert world.open("odd", nbytes=PAGE + 1).slot_bytes == 2 * PAGE


def test_a_namespace_comes_back_with_its_epoch(world: World) -> None:
    shape = NamespaceShape(TENANT, PAGE, 16, True)
    assert world.cache.open_namespace(key("old"), shape, 7).epoch == 7
    assert world.cache.open_namespace(key("old"), shape).epoch == 7


# -- delete ---------------------------------------------------------------------------------------------------


def test_delete_forgets_a_block_and_what_hangs_on_it(world: World) -> None:
    space = world.open()
    world.put(space, chain(4))
    world.put(space, chain(2, "b"), chain(2)[-1])
    assert world.cache.delete(space, chain(3)[2]) == 2
    assert world.match(space, chain(4)) == 2
    assert world.match(space, [*chain(2), *chain(2, "b")]) == 4
    assert world.cache.delete(space, packed([chain(1)[0], key("unknown")])) == 4
    assert not space.blocks and slots_of(world) == []
    check(world)


def test_delete_in_a_set_takes_single_blocks(world: World) -> None:
    space = world.open(chain=False)
    world.put(space, chain(4))
    assert world.cache.delete(space, packed([chain(4)[1], chain(4)[1], chain(4)[3]])) == 2
    assert world.exists(space, chain(4)) == [True, False, True, False]
    check(world)


def test_delete_takes_every_copy(world: World) -> None:
    space = world.open()
    world.put(space, chain(3))
    world.save_all()
    world.cache.evict(WARM, PAGE)
    assert world.cache.delete(space, chain(1)[0]) == 3
    world.delete_all()
    assert not world.media[COLD]
    check(world)
    check_media(world)


def test_delete_takes_orphans_with_their_hole(world: World) -> None:
    space = world.open()
    world.put(space, chain(4))
    lost = space.blocks[chain(2)[1]]
    world.cache.residency.drop_warm(lost)
    world.cache.index.lost(lost)
    assert world.cache.delete(space, lost.key) == 2
    assert set(space.blocks) == set(chain(1))
    assert world.cache.index.orphans == 0
    check(world)


# -- clear ----------------------------------------------------------------------------------------------------


def test_clear_is_one_step_however_much_there_is(world: World) -> None:
    space = world.open()
    world.put(space, chain(8))
    generations = len(world.memory.writes)
    assert world.cache.clear(space) == 1
    assert len(world.memory.writes) == generations  # nothing was touched
    assert world.match(space, chain(8)) == 0
    assert world.cache.find_prefix(chain(8)[0][:4], TENANT, b"", 64) == []


def test_leases_outlive_a_clear(world: World) -> None:
    """A worker that is in the middle of a read finishes it; nobody else gets the old bytes."""
    space = world.open()
    world.put(space, chain(3))
    lease = world.lease(space, chain(3))
    told = promises(lease)
    world.cache.clear(space)
    world.put(space, chain(3), variant=1)
    world.cache.moves.reap(99)
    assert [content.epoch for promise in told if (content := world.memory.read(promise))] == [0, 0, 0]
    check(world)
    fresh = promises(world.lease(space, chain(3)))
    assert [content.epoch for promise in fresh if (content := world.memory.read(promise))] == [1, 1, 1]
    world.release(lease)
    assert [world.memory.read(promise) for promise in told] == [None] * 3
    check(world)


def test_a_clear_of_one_namespace_leaves_the_others(world: World) -> None:
    first, second = world.open("a"), world.open("b")
    world.put(first, chain(2))
    world.put(second, chain(2))
    world.cache.clear(first)
    world.cache.moves.reap(99)
    assert (world.match(first, chain(2)), world.match(second, chain(2))) == (0, 2)
    assert second.epoch == 0


def test_orphans_are_counted_out_as_a_clear_is_emptied(world: World) -> None:
    space = world.open()
    world.put(space, chain(6))
    for name in (chain(6)[3], chain(6)[1]):
        world.cache.residency.drop_warm(space.blocks[name])
        world.cache.index.lost(space.blocks[name])
    world.cache.clear(space)
    while world.cache.moves.reap(1):
        check(world)
    assert world.cache.index.orphans == 0
    check_nothing_left(world)


# -- restart --------------------------------------------------------------------------------------------------


def test_a_restart_serves_what_was_saved(world: World) -> None:
    space = world.open()
    world.put(space, chain(6))
    for save in world.start_saves(4):
        world.end_save(save)
    space = world.restart({"ns": space})["ns"]
    check(world)
    check_media(world)
    assert world.match(space, chain(6)) == 4
    lease = world.lease(space, chain(6))
    assert world.load_all() == 4
    assert world.ready(lease) == 4
    assert [content.key for promise in promises(lease) if (content := world.memory.read(promise))] == chain(4)
    check(world)


def test_a_restart_in_the_middle_of_everything(world: World) -> None:
    space = world.open()
    world.put(space, chain(6))
    saves = world.start_saves(4)
    world.end_save(saves[0])
    world.lease(space, chain(3))
    world.begin(space, chain(2, "b"))
    space = world.restart({"ns": space})["ns"]
    check(world)
    assert world.match(space, chain(6)) == 1
    assert slots_of(world) == []


def test_a_restart_after_a_clear_does_not_bring_back_the_old_epoch(world: World) -> None:
    """The saver had begun before the clear and ended after it, and then the daemon was killed."""
    space = world.open()
    world.put(space, chain(4))
    saves = world.start_saves(2)
    world.cache.clear(space)
    for save in saves:
        world.end_save(save)
    for save in world.start_saves():
        world.end_save(save)
    space = world.restart({"ns": space})["ns"]
    assert space.epoch == 1
    assert world.match(space, chain(4)) == 0
    check(world)
    check_media(world)


def test_a_restart_that_lost_a_parent_hides_its_children_until_it_is_put(world: World) -> None:
    space = world.open()
    world.put(space, chain(5))
    world.save_all()
    del world.media[COLD][space.digest, chain(3)[2]]
    space = world.restart({"ns": space})["ns"]
    assert world.match(space, chain(5)) == 2
    assert world.exists(space, chain(5)) == [True, True, False, False, False]
    assert world.cache.index.orphans == 3  # the hole and the two below it
    check(world)
    assert world.put(space, chain(5)) == ["EXISTS", "EXISTS", "STORED", "EXISTS", "EXISTS"]
    assert world.match(space, chain(5)) == 5
    check(world)


def test_a_restart_with_a_smaller_cold_tier_keeps_to_it(world: World) -> None:
    space = world.open()
    world.put(space, chain(6))
    world.save_all()
    world.cold_bytes = 4 * PAGE
    space = world.restart({"ns": space})["ns"]
    assert world.cache.residency.budgets[COLD].used_bytes == 6 * PAGE
    world.cache.trim(COLD)
    world.delete_all()
    assert world.match(space, chain(6)) == 4
    check(world)
    check_media(world)


def test_a_restart_with_smaller_limits_keeps_to_them() -> None:
    world = World(warm_bytes=20 * PAGE, cold_bytes=64 * PAGE, slab_bytes=2 * PAGE)
    mine, theirs = world.open("a", "a"), world.open("b", "b")
    world.put(mine, chain(3))
    world.put(theirs, chain(3))
    world.save_all()
    world.tenant_bytes = {COLD: {"a": PAGE}}
    spaces = world.restart({"a": mine, "b": theirs})
    world.cache.trim(COLD)
    world.delete_all()
    assert (world.match(spaces["a"], chain(3)), world.match(spaces["b"], chain(3))) == (1, 3)
    check(world)
    check_media(world)


def test_a_record_found_twice_counts_once(world: World) -> None:
    space = world.open()
    world.put(space, chain(1))
    world.save_all()
    ((_, record),) = world.media[COLD].items()
    space = world.restart({"ns": space})["ns"]
    world.cache.recover(space, RecoveredBlock(chain(1)[0], b"", record.checksum, record.stored_bytes))
    check(world)


# -- admin ----------------------------------------------------------------------------------------------------


def test_evict_stops_when_enough_has_gone(world: World) -> None:
    space = world.open()
    world.put(space, chain(6))
    assert world.cache.evict(WARM, 2 * PAGE + 1) == (3, 3 * PAGE)
    assert world.cache.evict(WARM, 99 * PAGE) == (3, 3 * PAGE)
    assert world.cache.evict(WARM, PAGE) == (0, 0)
    assert world.cache.evict(HOT, PAGE) == (0, 0)
    assert world.cache.evict(COLD, PAGE) == (0, 0)
    check(world)


def test_evict_takes_the_oldest_of_all_classes_and_tenants() -> None:
    world = World(warm_bytes=12 * PAGE, slab_bytes=2 * PAGE)
    first, second = world.open("a", "a"), world.open("b", "b", nbytes=2 * PAGE)
    world.put(first, chain(1))
    world.put(second, chain(1))
    world.put(first, chain(1, "c"))
    world.match(first, chain(1))
    world.cache.evict(WARM, 1)
    assert (world.match(first, chain(1)), world.match(second, chain(1))) == (1, 0)
    check(world)


def test_blocks_are_found_by_the_beginning_of_their_key(world: World) -> None:
    mine, other, foreign = world.open("a"), world.open("b"), world.open("c", "stranger")
    for space in (mine, other, foreign):
        world.put(space, chain(2))
    name = chain(2)[1]
    assert {block.namespace for block in world.cache.find_prefix(name[:4], TENANT, b"", 9)} == {mine, other}
    assert [block.namespace for block in world.cache.find_prefix(name, TENANT, mine.digest, 9)] == [mine]
    assert len(world.cache.find_prefix(name[:1], TENANT, b"", 1)) == 1


# -- the whole ------------------------------------------------------------------------------------------------


def test_after_everything_has_ended_nothing_is_left() -> None:
    world = World(cold_bytes=12 * PAGE, hot_bytes=3 * PAGE, promote_hits=1)
    order = random.Random(11)
    spaces = [world.open("a"), world.open("b", chain=False), world.open("c", "other")]
    for turn in range(200):
        space = order.choice(spaces)
        keys = chain(order.randrange(1, 6), ("k", order.randrange(4)))
        step = order.randrange(6)
        if step < 2:
            world.put(space, keys, variant=turn)
        elif step == 2:
            world.acquire(space, keys, session=order.randrange(3))
        elif step == 3:
            world.load_all(order.choice(list(Answer)))
        elif step == 4:
            world.save_all()
            world.promote_all()
        else:
            world.cache.delete(space, order.choice(keys))
            world.cache.reads.leases.end_session(order.randrange(3))
        check(world)
    world.load_all()
    for session in range(3):
        world.cache.reads.leases.end_session(session)
    for space in spaces:
        world.cache.clear(space)
    while world.cache.moves.reap(10):
        check(world)
    world.delete_all()
    check_nothing_left(world)
    assert not world.media[COLD] and not world.media[HOT]


def test_a_tenant_has_so_many_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "NAMESPACES_MAX", 3)
    world = World()
    for name in "abc":
        world.open(name)
    with pytest.raises(QuotaExceeded, match="has 3 namespaces"):
        world.open("d")
    world.open("d", tenant="another")
    assert world.open("a") is world.cache.index.namespaces[key(("namespace", "a"))]
