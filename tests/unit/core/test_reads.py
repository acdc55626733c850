"""Reading: what a lease promises, what it pins, and what its reader can see, from acquire to the last unpin."""

from __future__ import annotations

import pytest

from core_checks import check, slots_of
from core_world import PAGE, Answer, World, chain, key, packed, promises, tiers_of, warm_bytes_for
from kvstore.core.block import COLD, HOT, WARM, Namespace
from kvstore.core.leases import Lease
from kvstore.core.reads import AcquireGroup, Readiness

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


# -- match ----------------------------------------------------------------------------------------------------


def test_match_pins_nothing_and_loads_nothing(world: World) -> None:
    space = world.open()
    cool(world, space, chain(3))
    assert world.match(space, chain(5)) == 3
    assert not world.cache.reads.loads and not slots_of(world)
    check(world)


def test_match_counts_each_block_for_its_fastest_tier() -> None:
    world = World(cold_bytes=64 * PAGE, hot_bytes=64 * PAGE, promote_hits=1)
    space = world.open()
    world.put(space, chain(2))
    world.release(world.lease(space, chain(2)))
    world.promote_all()
    world.put(space, chain(2, start=2), chain(2)[-1])
    cool(world, space, chain(1, start=4), chain(4)[-1])
    found = world.cache.reads.match(space, packed(chain(6)))
    assert (found.blocks, found.tokens, found.hot, found.warm, found.cold) == (5, 80, 2, 2, 1)


def test_match_is_a_use_of_the_prefix(world: World) -> None:
    space = world.open()
    for name in "ab":
        world.put(space, chain(2, name))
    world.match(space, chain(2, "a"))
    world.cache.evict(WARM, 2 * PAGE)
    assert (world.match(space, chain(2, "a")), world.match(space, chain(2, "b"))) == (2, 0)


def test_peek_changes_nothing(world: World) -> None:
    space = world.open()
    cool(world, space, chain(2))
    before = [(block.touched, block.queued) for block in space.blocks.values()]
    assert world.cache.reads.peek(space, packed(chain(3))) == world.cache.reads.peek(space, packed(chain(3)))
    assert world.cache.reads.peek(space, packed(chain(3))).blocks == 2
    assert [(block.touched, block.queued) for block in space.blocks.values()] == before
    assert world.cache.reads.match_lookups == 0


def test_what_lies_in_a_tier_that_is_down_is_a_miss(world: World) -> None:
    space = world.open()
    cool(world, space, chain(3))
    lease = world.lease(space, chain(1))
    world.load_all()
    world.lose_tier(COLD)
    assert world.match(space, chain(3)) == 1
    assert world.exists(space, chain(3)) == [True, False, False]
    assert world.cache.reads.peek(space, packed(chain(3))).blocks == 1
    again = world.lease(space, chain(3))
    assert len(again.parts[0].slots) == 1
    world.cache.residency.up[COLD] = True
    assert world.match(space, chain(3)) == 3
    world.release(lease)
    check(world)


def test_an_orphan_is_absent_whatever_tier_it_is_in(world: World) -> None:
    space = world.open()
    cool(world, space, chain(3))
    load_and_lose(world, space, chain(1))
    assert world.match(space, chain(3)) == 0
    assert world.exists(space, chain(3)) == [False, False, False]
    assert world.acquire(space, chain(3)) is None


def load_and_lose(world: World, space: Namespace, keys: list[bytes]) -> None:
    """The cold copy of the last of `keys` proves corrupt."""
    lease = world.lease(space, keys)
    world.load_all(Answer.CORRUPT)
    world.release(lease)


# -- acquire and release --------------------------------------------------------------------------------------


def test_a_lease_pins_the_longest_stored_prefix(world: World) -> None:
    space = world.open()
    world.put(space, chain(4))
    lease = world.lease(space, chain(6))
    assert (lease.tokens, len(lease.parts[0].slots), world.ready(lease)) == (64, 4, 4)
    assert [slot.pins for slot in lease.parts[0].slots] == [1] * 4
    check(world)
    world.release(lease)
    check(world)


def test_nothing_stored_is_no_lease(world: World) -> None:
    assert world.acquire(world.open(), chain(3)) is None
    assert world.acquire(world.open(), []) is None
    assert len(world.cache.reads.leases) == 0


def test_a_leased_block_stays_where_it_is(world: World) -> None:
    space = world.open()
    world.put(space, chain(8))
    lease = world.lease(space, chain(3))
    told = promises(lease)
    for name in "bcdefg":
        world.put(space, chain(5, name))
    check(world)
    for promise in told:
        content = world.memory.read(promise)
        assert content is not None and content.key == promise.key
    world.release(lease)


def test_a_slot_reused_after_a_lease_is_never_foreign_bytes(world: World) -> None:
    space = world.open()
    world.put(space, chain(8))
    lease = world.lease(space, chain(8))
    told = promises(lease)
    world.release(lease)
    for name in "bcdefg":
        world.put(space, chain(8, name))
    assert {slot.ref for slot in slots_of(world)} == {promise.ref for promise in told}
    assert [world.memory.read(promise) for promise in told] == [None] * 8


def test_release_to_streams_a_long_prefix_through_a_small_warm_tier(world: World) -> None:
    space = world.open()
    cool(world, space, chain(20))
    done = 0
    while done < 20:
        lease = world.lease(space, chain(20)[done:])
        world.load_all()
        count = world.ready(lease)
        assert count == 8
        for upto in range(2, count + 1, 2):
            world.release(lease, upto)
            check(world)
            more = world.acquire(space, chain(20)[done : done + 1], session=2)
            assert more is not None
            world.release(more)
        world.release(lease)
        done += count
        if done == 16:
            assert len(world.lease(space, chain(20)[done:]).parts[0].slots) == 4
            break


def test_what_a_lease_has_given_back_may_leave(world: World) -> None:
    space = world.open()
    for name in "ab":
        world.put(space, chain(4, name))
    first, second = world.lease(space, chain(4, "a")), world.lease(space, chain(4, "b"))
    assert world.put(space, chain(2, "c")) == ["NO_ROOM", "NO_PARENT"]
    world.release(first, 3)
    assert world.put(space, chain(2, "c")) == ["NO_ROOM", "NO_PARENT"]  # its leaf is still held
    world.release(first)
    assert world.put(space, chain(2, "c")) == ["STORED", "STORED"]
    world.release(second)
    check(world)


def test_in_a_set_each_block_given_back_may_leave(world: World) -> None:
    space = world.open(chain=False)
    world.put(space, chain(8))
    lease = world.lease(space, chain(8))
    assert world.put(space, chain(3, "b")) == ["NO_ROOM"] * 3
    world.release(lease, 3)
    assert world.put(space, chain(4, "b")) == ["STORED"] * 3 + ["NO_ROOM"]
    check(world)


def test_deleting_a_leased_block_leaves_its_bytes_to_the_reader(world: World) -> None:
    space = world.open()
    world.put(space, chain(2))
    lease = world.lease(space, chain(2))
    told = promises(lease)
    assert world.cache.delete(space, chain(1)[0]) == 2
    assert world.match(space, chain(2)) == 0
    assert states(lease) == ["RETIRING", "RETIRING"]
    assert world.put(space, chain(8, "b")) == ["STORED"] * 6 + ["NO_ROOM", "NO_PARENT"]
    assert [content.key for promise in told if (content := world.memory.read(promise))] == chain(2)
    check(world)
    world.release(lease)
    assert [world.memory.read(promise) for promise in told] == [None, None]
    check(world)


def test_a_leased_block_whose_child_was_deleted_may_leave_after_the_lease(world: World) -> None:
    space = world.open()
    world.put(space, chain(3))
    lease = world.lease(space, chain(3))
    world.cache.delete(space, chain(2)[1])
    assert world.cache.evict(WARM, PAGE) == (0, 0)
    world.release(lease)
    check(world)
    assert world.cache.evict(WARM, PAGE) == (1, PAGE)


def test_a_slot_waits_for_every_lease_on_it(world: World) -> None:
    space = world.open()
    world.put(space, chain(1))
    leases = [world.lease(space, chain(1), session) for session in (1, 2, 3)]
    world.cache.delete(space, chain(1)[0])
    for lease in leases:
        assert len(slots_of(world)) == 1
        world.release(lease)
    assert slots_of(world) == []


def test_leases_of_a_dead_session_give_their_pins_back(world: World) -> None:
    space = world.open()
    world.put(space, chain(8))
    world.lease(space, chain(8), session=7)
    world.cache.reads.leases.end_session(7)
    check(world)
    assert world.put(space, chain(8, "b")) == ["STORED"] * 8


def test_an_expired_lease_gives_its_pins_back(world: World) -> None:
    space = world.open()
    world.put(space, chain(8))
    lease = world.lease(space, chain(8))
    assert world.cache.reads.leases.expire(lease.expires_s) == [lease]
    check(world)
    assert world.put(space, chain(8, "b")) == ["STORED"] * 8


def test_keys_that_are_not_one_chain_are_leased_as_far_as_they_are(world: World) -> None:
    space = world.open()
    world.put(space, chain(4))
    keys = chain(4)
    lease = world.lease(space, [keys[0], key("absent"), keys[2], keys[3]])
    assert [block.key for block in lease.parts[0].blocks] == keys[:1]
    assert lease.tokens == 16
    check(world)


@pytest.mark.parametrize("chained", [True, False])
def test_a_key_asked_for_twice_is_loaded_once(world: World, chained: bool) -> None:
    space = world.open(chain=chained)
    cool(world, space, chain(1))
    lease = world.lease(space, chain(1) * 3)
    assert len(world.cache.reads.loads) == 1
    assert world.load_all() == 1
    assert world.ready(lease) == (1 if chained else 3)
    check(world)
    world.release(lease)
    check(world)


# -- several namespaces ---------------------------------------------------------------------------------------


def group(space: Namespace, keys: list[bytes], last: bool = False) -> AcquireGroup:
    return AcquireGroup(space, packed(keys), last)


def test_several_ranks_get_the_longest_position_that_all_can_serve(world: World) -> None:
    left, right = world.open("left"), world.open("right")
    world.put(left, chain(5))
    world.put(right, chain(3))
    lease = world.acquire_all([group(left, chain(5)), group(right, chain(5))])
    assert lease is not None
    assert (lease.tokens, [len(part.slots) for part in lease.parts]) == (48, [3, 3])
    check(world)
    world.release(lease)
    check(world)


def test_or_nothing(world: World) -> None:
    left, right = world.open("left"), world.open("right")
    world.put(left, chain(5))
    assert world.acquire_all([group(left, chain(5)), group(right, chain(5))]) is None
    check(world)


def test_positions_are_counted_in_tokens(world: World) -> None:
    fine, coarse = world.open("fine", block_tokens=16), world.open("coarse", block_tokens=64)
    world.put(fine, chain(7))
    world.put(coarse, chain(3, "coarse"))
    lease = world.acquire_all([group(fine, chain(7)), group(coarse, chain(3, "coarse"))])
    assert lease is not None
    assert (lease.tokens, [len(part.slots) for part in lease.parts]) == (64, [4, 1])


def test_last_pins_only_the_block_at_the_position(world: World) -> None:
    prefix, state = world.open("prefix"), world.open("state", chain=False)
    world.put(prefix, chain(5))
    world.put(state, [chain(5, "s")[1], chain(5, "s")[3]])
    lease = world.acquire_all([group(prefix, chain(5)), group(state, chain(5, "s"), last=True)])
    assert lease is not None
    assert lease.tokens == 64  # the longest position that has a state
    assert [(part.first_block, len(part.slots)) for part in lease.parts] == [(0, 4), (3, 1)]
    assert lease.parts[1].blocks[0].key == chain(5, "s")[3]
    check(world)


def test_what_was_foreseen_is_a_bound_and_no_promise(world: World) -> None:
    prefix, state = world.open("prefix"), world.open("state", chain=False)
    world.put(prefix, chain(5))
    world.put(state, [chain(5, "s")[1], chain(5, "s")[3]])
    groups = [group(prefix, chain(5)), group(state, chain(5, "s"), last=True)]
    assert world.cache.reads.foresee(groups[:1]) is None, "a prefix alone is a binary search"
    below = world.cache.reads.foresee(groups)
    assert below == 64
    world.cache.delete(state, chain(5, "s")[3])  # between the two looks
    lease = world.cache.reads.acquire(1, "default", groups, world.now_s, below)
    assert lease is not None
    assert lease.tokens == 32
    check(world)


def test_release_to_keeps_the_state_at_the_end(world: World) -> None:
    prefix, state = world.open("prefix"), world.open("state", chain=False)
    world.put(prefix, chain(4))
    world.put(state, chain(4, "s")[3:])
    lease = world.acquire_all([group(prefix, chain(4)), group(state, chain(4, "s"), last=True)])
    assert lease is not None
    world.release(lease, 3)
    assert [part.released for part in lease.parts] == [3, 0]
    check(world)
    world.release(lease, 4)
    assert lease.pinned == 0


def test_readiness_of_a_state_counts_from_its_place(world: World) -> None:
    prefix, state = world.open("prefix"), world.open("state", chain=False)
    world.put(prefix, chain(3))
    cool(world, state, chain(3, "s")[2:])
    lease = world.acquire_all([group(prefix, chain(3)), group(state, chain(3, "s"), last=True)])
    assert lease is not None
    assert readiness(world, lease, 2) == Readiness(2, 0, None)  # the state lies behind what is waited for
    assert readiness(world, lease, 3) == Readiness(2, 0, lease.parts[1].slots[0])
    world.load_all(Answer.CORRUPT)
    assert readiness(world, lease, 3) == Readiness(2, 3, None)


def test_a_shortage_in_one_namespace_shortens_all(world: World) -> None:
    left, right = world.open("left"), world.open("right")
    cool(world, left, chain(6))
    cool(world, right, chain(6))
    lease = world.acquire_all([group(left, chain(6)), group(right, chain(6))])
    assert lease is not None
    assert lease.tokens % 16 == 0 and 0 < lease.tokens <= 64
    assert len({len(part.slots) for part in lease.parts}) == 1
    check(world)
    world.release(lease)
    world.load_all()
    check(world)


def test_room_for_one_part_is_not_made_of_another_part() -> None:
    world = tiered(slots=4)
    left, right = world.open("left"), world.open("right")
    cool(world, left, chain(2))
    world.put(right, chain(2))  # in warm only, and older than anything else
    world.put(left, chain(1, "x"))
    lease = world.acquire_all([group(left, chain(2)), group(right, chain(2))])
    assert lease is not None
    world.load_all()
    assert readiness(world, lease, 2) == Readiness(2, 0, None)
    check(world)


def test_two_groups_may_name_the_same_blocks(world: World) -> None:
    space = world.open()
    cool(world, space, chain(3))
    lease = world.acquire_all([group(space, chain(3)), group(space, chain(3), last=True)])
    assert lease is not None
    assert world.load_all() == 3
    assert readiness(world, lease, 3).ready == 3
    check(world)
    world.release(lease)
    check(world)


# -- hot ------------------------------------------------------------------------------------------------------


def hot_world() -> World:
    return World(cold_bytes=64 * PAGE, hot_bytes=4 * PAGE)


def test_a_block_is_promoted_on_its_second_use() -> None:
    world = hot_world()
    space = world.open()
    world.put(space, chain(2))
    world.release(world.lease(space, chain(2)))
    assert world.promote_all() == 0
    world.release(world.lease(space, chain(1)))
    assert world.promote_all() == 1
    assert [tiers_of(space.blocks[name]) for name in chain(2)] == ["hot warm", "warm"]
    check(world)


def test_a_block_that_left_hot_is_promoted_again() -> None:
    world = hot_world()
    space = world.open()
    world.put(space, chain(1))
    for _ in range(2):
        world.release(world.lease(space, chain(1)))
    assert world.promote_all() == 1
    assert world.cache.evict(HOT, PAGE) == (1, PAGE)
    world.release(world.lease(space, chain(1)))
    assert world.promote_all() == 0, "it has to earn its place anew, or a small tier would be turned over for ever"
    world.release(world.lease(space, chain(1)))
    assert world.promote_all() == 1
    check(world)


def test_a_block_climbs_one_tier_after_the_other() -> None:
    world = hot_world()
    space = world.open()
    cool(world, space, chain(1))
    block = space.blocks[chain(1)[0]]
    read_and_drop(world, space)
    lease = world.lease(space, chain(1))
    world.load_all()
    world.release(lease)
    assert not block.spare & WARM, "the second hit in cold"
    assert world.promote_all() == 0
    for _ in range(2):
        world.release(world.lease(space, chain(1)))
    assert world.promote_all() == 1
    check(world)


def read_and_drop(world: World, space: Namespace) -> None:
    lease = world.lease(space, chain(1))
    world.load_all()
    world.release(lease)
    world.cache.evict(WARM, PAGE)


def test_without_a_hot_tier_nothing_is_promoted(world: World) -> None:
    space = world.open()
    world.put(space, chain(1))
    for _ in range(5):
        world.release(world.lease(space, chain(1)))
    assert not world.cache.reads.promotions


# -- counters -------------------------------------------------------------------------------------------------


def test_lookups_and_hits_are_counted(world: World) -> None:
    space = world.open()
    world.put(space, chain(3))
    reads = world.cache.reads
    world.lease(space, chain(5))
    assert (reads.lookups, reads.hit_blocks) == (5, 3)
    world.match(space, chain(4))
    assert (reads.match_lookups, reads.match_hit_blocks) == (4, 3)
    assert world.cache.residency.counts[WARM].hits == 3


def test_a_lease_on_a_set_is_a_use_of_each_of_its_blocks() -> None:
    world = World(warm_bytes_for(8))
    space = world.open(chain=False)
    for i in range(8):
        world.put(space, [key(i)])
    used = [key(i) for i in range(3)]
    world.release(world.lease(space, used))
    for i in range(8, 12):
        world.put(space, [key(i)])
    assert world.exists(space, [key(i) for i in range(12)]) == [True] * 3 + [False] * 4 + [True] * 5
