"""Putting: nothing is visible before finish, and every block gets an honest answer."""

from __future__ import annotations

from collections import Counter

import pytest

from core_checks import check, slots_of
from core_world import PAGE, World, chain, key, outcomes, packed, warm_bytes_for
from kvstore.core.block import COLD, WARM
from kvstore.core.puts import Reject
from kvstore.core.slots import SlotState


@pytest.fixture
def world() -> World:
    """Eight slots of warm, no tier below."""
    return World()


def counted(world: World) -> tuple[int, int, dict[Reject, int]]:
    return world.cache.puts.stored, world.cache.puts.exists, world.cache.puts.rejected


# -- what is visible when -------------------------------------------------------------------------------------


def test_nothing_of_a_put_is_visible_before_finish(world: World) -> None:
    space = world.open()
    plan = world.begin(space, chain(3))
    world.copy(plan)
    assert world.match(space, chain(3)) == 0
    assert not any(world.memory.generations.values())
    assert [slot.state for slot in slots_of(world)] == [SlotState.FILLING] * 3
    check(world)
    assert world.finish(plan) == ["STORED"] * 3
    assert world.match(space, chain(3)) == 3
    check(world)


def test_a_writer_that_vanished_publishes_nothing(world: World) -> None:
    """The session died in the middle of its copies: what was never written is never found."""
    space = world.open()
    plan = world.begin(space, chain(4))
    world.copy(plan, stop=2)
    assert world.finish(plan) == ["STORED", "STORED", "DEADLINE", "DEADLINE"]
    assert world.match(space, chain(4)) == 2
    assert not world.cache.slots.filling
    check(world)


def test_filling_slots_are_not_victims_of_another_put(world: World) -> None:
    space = world.open()
    plan = world.begin(space, chain(6))
    assert world.put(space, chain(4, "b")) == ["STORED", "STORED", "NO_ROOM", "NO_PARENT"]
    world.copy(plan)
    assert world.finish(plan) == ["STORED"] * 6
    check(world)


def test_a_put_of_nothing(world: World) -> None:
    assert world.put(world.open(), []) == []
    check(world)


# -- parents --------------------------------------------------------------------------------------------------


def test_a_put_continues_what_is_stored(world: World) -> None:
    space = world.open()
    world.put(space, chain(2))
    assert world.put(space, chain(2, start=2), chain(2)[-1]) == ["STORED", "STORED"]
    assert world.match(space, chain(4)) == 4


def test_a_put_names_the_parent_of_its_first_key(world: World) -> None:
    space = world.open()
    assert world.put(space, chain(3)[1:], chain(1)[0]) == ["NO_PARENT", "NO_PARENT"]
    assert slots_of(world) == []
    assert counted(world) == (0, 0, {Reject.NO_PARENT: 2})


def test_a_block_is_not_stored_under_an_orphan(world: World) -> None:
    space = world.open()
    world.put(space, chain(3))
    world.cache.residency.drop_warm(space.blocks[chain(1)[0]])  # proved corrupt
    world.cache.index.lost(space.blocks[chain(1)[0]])
    assert world.put(space, chain(1, start=3), chain(3)[-1]) == ["NO_PARENT"]
    check(world)


def test_after_a_rejected_block_the_rest_have_no_parent(world: World) -> None:
    space = world.open()
    plan = world.begin(space, chain(4))
    world.copy(plan)
    plan.items[1].checksum, plan.items[1].reason = b"", Reject.CHECKSUM
    assert world.finish(plan) == ["STORED", "CHECKSUM", "NO_PARENT", "NO_PARENT"]
    assert world.match(space, chain(4)) == 1
    check(world)


def test_the_parent_may_go_between_begin_and_finish(world: World) -> None:
    space = world.open()
    world.put(space, chain(1))
    plan = world.begin(space, chain(2, start=1), chain(1)[0])
    world.cache.delete(space, chain(1)[0])
    world.copy(plan)
    assert world.finish(plan) == ["NO_PARENT", "NO_PARENT"]
    assert slots_of(world) == []
    check(world)


def test_orphans_are_found_again_when_the_parent_is_put(world: World) -> None:
    space = world.open()
    world.put(space, chain(4))
    world.cache.residency.drop_warm(space.blocks[chain(2)[1]])
    world.cache.index.lost(space.blocks[chain(2)[1]])
    assert world.match(space, chain(4)) == 1
    assert world.put(space, chain(4)) == ["EXISTS", "STORED", "EXISTS", "EXISTS"]
    assert world.match(space, chain(4)) == 4
    assert len(slots_of(world)) == 4
    check(world)


# -- room -----------------------------------------------------------------------------------------------------


def test_a_batch_that_fits_in_part_is_stored_in_part(world: World) -> None:
    space = world.open()
    lease = None
    world.put(space, chain(5))
    lease = world.lease(space, chain(5))
    assert world.put(space, chain(5, "b")) == ["STORED"] * 3 + ["NO_ROOM"] + ["NO_PARENT"]
    assert world.match(space, chain(5, "b")) == 3
    world.release(lease)
    check(world)


def test_in_a_set_every_block_without_room_says_so() -> None:
    world = World(warm_bytes_for(2))
    space = world.open(chain=False)
    lease_keys = chain(1)
    world.put(space, lease_keys)
    world.lease(space, lease_keys)
    assert world.put(space, chain(3, "b")) == ["STORED", "NO_ROOM", "NO_ROOM"]
    check(world)


def test_a_put_drops_what_is_oldest_and_unpinned(world: World) -> None:
    space = world.open()
    for name in "abcdefgh":
        world.put(space, chain(1, name))
    world.lease(space, chain(1, "a"))
    assert world.put(space, chain(2, "new")) == ["STORED", "STORED"]
    left = [name for name in "abcdefgh" if world.match(space, chain(1, name))]
    assert left == ["a", "d", "e", "f", "g", "h"]
    check(world)


def test_room_for_new_blocks_is_not_made_by_dropping_their_parent() -> None:
    world = World(warm_bytes_for(4))
    space = world.open()
    world.put(space, chain(1))
    assert world.put(space, chain(4, start=1), chain(1)[0]) == ["STORED"] * 3 + ["NO_ROOM"]
    assert world.match(space, chain(5)) == 4
    check(world)


def test_nor_by_dropping_the_part_that_exists() -> None:
    world = World(warm_bytes_for(4))
    space = world.open()
    world.put(space, chain(2))
    assert world.put(space, chain(5)) == ["EXISTS"] * 2 + ["STORED"] * 2 + ["NO_ROOM"]
    assert world.match(space, chain(5)) == 4
    check(world)


def test_the_parent_stays_until_finish_whatever_others_put() -> None:
    world = World(warm_bytes_for(4))
    space = world.open()
    world.put(space, chain(1))
    plan = world.begin(space, chain(1, start=1), chain(1)[0])
    for name in "bcdef":
        assert world.put(space, chain(1, name)) == ["STORED"]
        check(world)
    world.copy(plan)
    assert world.finish(plan) == ["STORED"]
    assert world.put(space, chain(4, "g")) == ["STORED"] * 4  # and is let go then
    check(world)


def test_the_parent_is_let_go_when_a_put_is_cancelled() -> None:
    world = World(warm_bytes_for(2))
    space = world.open()
    world.put(space, chain(1))
    plan = world.begin(space, chain(3, start=1), chain(1)[0])
    world.cancel(plan)
    assert len(slots_of(world)) == 1
    check(world)
    assert world.put(space, chain(2, "b")) == ["STORED"] * 2


def test_what_exists_in_a_set_is_not_what_leaves_for_the_rest() -> None:
    world = World(warm_bytes_for(4))
    space = world.open(chain=False)
    world.put(space, chain(4))
    assert world.put(space, [*chain(2), *chain(2, "b")]) == ["EXISTS", "EXISTS", "STORED", "STORED"]
    assert world.exists(space, [*chain(4), *chain(2, "b")]) == [True, True, False, False, True, True]


def test_a_slab_is_made_before_anything_is_dropped() -> None:
    world = World(warm_bytes=4 * (PAGE + 4 * PAGE), slab_bytes=4 * PAGE)
    space = world.open()
    for name in "abcd":
        assert world.put(space, chain(4, name)) == ["STORED"] * 4
    assert len(slots_of(world)) == 16
    check(world)


def test_a_machine_that_gives_no_more_slabs_means_no_room() -> None:
    world = World(may_grow=False)
    assert world.put(world.open(), chain(2)) == ["NO_ROOM", "NO_PARENT"]
    check(world)


# -- the same key twice ---------------------------------------------------------------------------------------


def test_an_existing_block_is_not_copied_again(world: World) -> None:
    space = world.open()
    world.put(space, chain(2))
    plan = world.begin(space, chain(3))
    assert [item.slot is None for item in plan.items] == [True, True, False]
    world.copy(plan)
    assert world.finish(plan) == ["EXISTS", "EXISTS", "STORED"]
    assert counted(world) == (3, 2, {})


def test_a_put_racing_another_put_of_the_same_keys(world: World) -> None:
    space = world.open()
    first, second = world.begin(space, chain(2)), world.begin(space, chain(3))
    world.copy(first, variant=1)
    world.copy(second, variant=2)
    assert world.finish(second) == ["STORED"] * 3
    assert world.finish(first) == ["EXISTS"] * 2
    assert len(slots_of(world)) == 3
    check(world)  # the bytes and the checksum are of the one that was stored


def test_a_put_whose_rival_fails_is_stored(world: World) -> None:
    space = world.open()
    first, second = world.begin(space, chain(2)), world.begin(space, chain(2))
    assert world.finish(first) == ["DEADLINE"] * 2
    world.copy(second)
    assert world.finish(second) == ["STORED"] * 2
    check(world)


@pytest.mark.parametrize("chained", [True, False])
def test_a_key_twice_in_one_put(world: World, chained: bool) -> None:
    space = world.open(chain=chained)
    keys = [key("a"), key("a"), key("a")]
    assert world.put(space, keys) == ["STORED", "EXISTS", "EXISTS"]
    assert len(slots_of(world)) == 1
    check(world)


def test_a_put_on_a_cold_block_exists() -> None:
    world = World(cold_bytes=8 * PAGE)
    space = world.open()
    world.put(space, chain(1))
    world.save_all()
    world.cache.evict(WARM, PAGE)
    assert world.put(space, chain(1)) == ["EXISTS"]
    assert space.blocks[chain(1)[0]].copies == COLD


def test_a_block_deleted_while_it_loads_can_be_put_again() -> None:
    """The slot is the agent's until it has answered; the key is free."""
    world = World(cold_bytes=8 * PAGE)
    space = world.open()
    world.put(space, chain(1))
    world.save_all()
    world.cache.evict(WARM, PAGE)
    world.lease(space, chain(1))
    load = world.start_load()
    assert load is not None
    world.cache.delete(space, chain(1)[0])
    plan = world.begin(space, chain(1))
    world.copy(plan)
    assert world.finish(plan) == ["STORED"]
    check(world)
    world.end_load(load)
    assert len(slots_of(world)) == 1
    assert world.match(space, chain(1)) == 1
    check(world)


# -- clear ----------------------------------------------------------------------------------------------------


def test_a_put_over_a_clear_is_rejected(world: World) -> None:
    space = world.open()
    plan = world.begin(space, chain(2))
    world.copy(plan)
    world.cache.clear(space)
    assert world.finish(plan) == ["CLEARED", "CLEARED"]
    assert slots_of(world) == []
    assert world.match(space, chain(2)) == 0
    check(world)


def test_a_put_under_a_cleared_parent_is_rejected(world: World) -> None:
    space = world.open()
    world.put(space, chain(1))
    plan = world.begin(space, chain(1, start=1), chain(1)[0])
    world.copy(plan)
    world.cache.clear(space)
    world.cache.moves.reap(10)
    assert world.finish(plan) == ["CLEARED"]
    assert slots_of(world) == []
    check(world)


def test_after_a_clear_the_same_keys_are_new(world: World) -> None:
    space = world.open()
    world.put(space, chain(2))
    world.cache.clear(space)
    assert world.put(space, chain(2), variant=1) == ["STORED", "STORED"]
    world.cache.moves.reap(10)
    assert world.match(space, chain(2)) == 2
    check(world)


# -- cancel, counters -----------------------------------------------------------------------------------------


def test_a_cancelled_put_leaves_no_trace(world: World) -> None:
    space = world.open()
    plan = world.begin(space, chain(3))
    world.cancel(plan)
    assert slots_of(world) == []
    assert counted(world) == (0, 0, {})
    check(world)


def test_every_answer_is_counted_once(world: World) -> None:
    space = world.open()
    words: Counter[str] = Counter()
    for name in "aabbc":
        plan = world.begin(space, chain(4, name))
        world.copy(plan, stop=3)
        world.finish(plan)
        words.update(outcomes(plan))
    stored, exists, rejected = counted(world)
    assert words == {"STORED": stored, "EXISTS": exists, **{r.name: n for r, n in rejected.items()}}
    assert sum(words.values()) == 20


# -- tenants --------------------------------------------------------------------------------------------------


def test_a_tenant_keeps_to_its_budget() -> None:
    world = World(warm_bytes=12 * PAGE, slab_bytes=2 * PAGE, tenant_bytes={WARM: {"small": 2 * PAGE}})
    small, other = world.open("small", "small"), world.open("other", "other")
    assert world.put(other, chain(4)) == ["STORED"] * 4
    assert world.put(small, chain(3)) == ["STORED", "STORED", "QUOTA"]
    assert world.put(small, chain(2, "b")) == ["STORED", "STORED"]  # its own blocks leave for it
    assert (world.match(small, chain(3)), world.match(other, chain(4))) == (0, 4)
    check(world)


def test_a_tenants_budget_passes_from_one_layout_to_another() -> None:
    world = World(warm_bytes=12 * PAGE + 4 * PAGE, slab_bytes=2 * PAGE, tenant_bytes={WARM: {"t": 4 * PAGE}})
    old, new = world.open("old", "t"), world.open("new", "t", nbytes=2 * PAGE)
    assert world.put(old, chain(4)) == ["STORED"] * 4
    assert world.put(new, chain(2, "new")) == ["STORED", "STORED"]
    assert world.match(old, chain(4)) == 0
    check(world)


def test_tenants_do_not_meet(world: World) -> None:
    mine, theirs = world.open("ns-a", "a"), world.open("ns-b", "b")
    world.put(mine, chain(2))
    assert world.match(theirs, chain(2)) == 0
    assert world.put(theirs, chain(1), chain(2)[-1]) == ["NO_PARENT"]
    assert packed(chain(2)) != b""


def test_a_put_that_cannot_even_begin_holds_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    space = world.open()
    world.put(space, chain(2))

    def exhausted(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as short:
        short.setattr(world.cache.residency, "take", exhausted)
        with pytest.raises(MemoryError):
            world.begin(space, chain(4))
    assert all(slot.pins == 0 for slot in slots_of(world))
    check(world)
    assert world.put(space, chain(4)) == ["EXISTS", "EXISTS", "STORED", "STORED"]
