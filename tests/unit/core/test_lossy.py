"""Namespaces whose cold copies lose precision: who is told, who may refuse, and what is never done twice."""

from __future__ import annotations

import pytest

from core_checks import check
from core_world import LOSSY, World, chain, packed, promises, tiers_of
from kvstore.core.block import COLD, HOT, WARM, Block, Namespace
from kvstore.core.leases import Lease
from kvstore.core.reads import AcquireGroup
from kvstore.engine.replies import lease_reply


@pytest.fixture
def world() -> World:
    """Warm of eight slots, cold of sixteen blocks."""
    return World(cold_bytes=16 * 4096)


def lossy(world: World) -> Namespace:
    return world.open("lossy", cold_codec="int8kv")


def blocks_of(space: Namespace, count: int) -> list[Block]:
    return [space.blocks[name] for name in chain(count)]


def marks(lease: Lease) -> list[int]:
    return list(lease_reply(lease).groups[0].lossy)


def variants(world: World, lease: Lease) -> list[int]:
    """What a reader finds, checked against what it was promised."""
    found = [world.memory.contents[promise.ref] for promise in promises(lease)]
    assert [content.checksum for content in found] == [promise.checksum for promise in promises(lease)]
    return [content.variant for content in found]


def test_while_warm_has_the_bytes_they_are_exact(world: World) -> None:
    space = lossy(world)
    world.put(space, chain(3))
    world.save_all()
    lease = world.lease(space, chain(3))
    assert variants(world, lease) == [0, 0, 0]
    assert marks(lease) == [0, 0, 0]
    assert all(block.lossy and not block.degraded for block in blocks_of(space, 3))
    check(world)


def test_what_comes_back_from_cold_is_marked_and_has_its_own_checksum(world: World) -> None:
    space = lossy(world)
    world.put(space, chain(3))
    world.save_all()
    world.cache.evict(WARM, 2 * 4096)
    lease = world.lease(space, chain(3))
    assert marks(lease) == [0, 1, 1], "told before a byte of it is there"
    world.load_all()
    assert variants(world, lease) == [0, LOSSY, LOSSY]
    check(world)


def test_a_reader_may_refuse(world: World) -> None:
    space = lossy(world)
    world.put(space, chain(3))
    world.save_all()
    world.cache.evict(WARM, 2 * 4096)
    exact = AcquireGroup(space, packed(chain(3)), exact=True)
    lease = world.acquire_all([exact])
    assert lease is not None
    assert (lease.tokens, variants(world, lease)) == (16, [0])
    assert not world.cache.reads.loads, "nothing is loaded for a reader that would not have it"
    world.cache.evict(WARM, 4096)
    world.release(lease)
    world.cache.evict(WARM, 4096)
    assert world.acquire_all([exact]) is None
    check(world)


def test_a_reader_of_the_last_block_may_refuse_too(world: World) -> None:
    states = world.open("states", chain=False, cold_codec="int8kv")
    world.put(states, [chain(4)[1], chain(4)[3]])
    world.save_all()
    world.cache.evict(WARM, 4096)
    gone = next(i for i in (1, 3) if not states.blocks[chain(4)[i]].copies & WARM)
    lease = world.acquire_all([AcquireGroup(states, packed(chain(4)), last=True, exact=True)])
    assert lease is not None
    assert lease.tokens == 16 * (5 - gone), "the position whose state is exact"


def test_lossy_bytes_are_never_encoded_again(world: World) -> None:
    space = lossy(world)
    world.put(space, chain(2))
    world.save_all()
    world.cache.evict(WARM, 2 * 4096)
    world.release(world.lease(space, chain(2)))
    world.load_all()
    world.cache.evict(COLD, 2 * 4096)
    world.delete_all()
    assert [tiers_of(block) for block in blocks_of(space, 2)] == ["warm", "warm"]
    assert world.save_all() == 0
    assert all(block.degraded for block in blocks_of(space, 2)), "readers are told, with or without the copy"
    check(world)


def test_exact_bytes_that_lost_their_cold_copy_are_saved_again(world: World) -> None:
    space = lossy(world)
    world.put(space, chain(2))
    world.save_all()
    world.cache.evict(COLD, 2 * 4096)
    world.delete_all()
    assert not any(block.lossy for block in blocks_of(space, 2))
    assert world.save_all() == 2
    check(world)


def test_a_restart_finds_lossy_copies_and_knows_them(world: World) -> None:
    space = lossy(world)
    world.put(space, chain(2))
    world.save_all()
    space = world.restart({"lossy": space})["lossy"]
    lease = world.lease(space, chain(2))
    assert marks(lease) == [1, 1]
    world.load_all()
    assert variants(world, lease) == [LOSSY, LOSSY]
    check(world)


def test_hot_never_has_other_bytes_than_cold() -> None:
    world = World(cold_bytes=16 * 4096, hot_bytes=8 * 4096)
    space = lossy(world)
    world.put(space, chain(2))
    for _ in range(5):
        world.release(world.lease(space, chain(2)))
    assert world.promote_all() == 0
    assert not any(block.copies & HOT for block in blocks_of(space, 2))


def test_elsewhere_nobody_is_told_anything(world: World) -> None:
    space = world.open()
    world.put(space, chain(2))
    world.save_all()
    world.cache.evict(WARM, 4096)
    lease = world.acquire_all([AcquireGroup(space, packed(chain(2)), exact=True)])
    assert lease is not None
    assert (lease.tokens, marks(lease)) == (32, [])
