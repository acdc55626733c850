"""The slab allocator: a slab's life, where slots come from, and a pool whose block size changes."""

from __future__ import annotations

import random

import pytest

from kvstore.core.slabs import SlabAllocator, SlabState, SlotRef

KIB, MIB = 1 << 10, 1 << 20
TARGET = 64 * MIB


def allocator(capacity_bytes: int = 256 * MIB, target_bytes: int = TARGET) -> SlabAllocator:
    return SlabAllocator(capacity_bytes, target_bytes)


def grow(pool: SlabAllocator, slot_bytes: int, tenant: str = "t") -> int:
    """One more LIVE slab; its id."""
    slab = pool.plan(tenant, slot_bytes)
    assert slab is not None
    pool.made(slab.slab_id)
    return slab.slab_id


def fill(pool: SlabAllocator, slot_bytes: int, tenant: str = "t") -> None:
    """Give all of the pool that is left to one class."""
    while (slab := pool.plan(tenant, slot_bytes)) is not None:
        pool.made(slab.slab_id)


# -- the life of a slab ---------------------------------------------------------------------------------------


def test_a_slab_serves_once_it_is_made() -> None:
    pool = allocator()
    slab = pool.plan("t", 2 * MIB)
    assert slab is not None
    assert slab.state is SlabState.MAKING
    assert pool.take("t", 2 * MIB, 1) == []
    assert pool.planned_bytes == slab.geometry.segment_bytes == 64 * MIB + 4096
    pool.made(slab.slab_id)
    assert slab.state is SlabState.LIVE
    assert pool.free_slots("t", 2 * MIB) == 32
    assert pool.take("t", 2 * MIB, 3) == [SlotRef(slab.slab_id, slot) for slot in range(3)]
    assert pool.used_bytes == slab.used_bytes == 6 * MIB
    assert pool.slab(slab.slab_id) is slab


def test_a_slab_that_could_not_be_made_leaves_no_trace() -> None:
    pool = allocator()
    slab = pool.plan("t", 2 * MIB)
    assert slab is not None
    pool.failed(slab.slab_id)
    assert pool.planned_bytes == 0
    assert list(pool.slabs()) == []
    with pytest.raises(KeyError):
        pool.slab(slab.slab_id)
    assert grow(pool, 2 * MIB) > slab.slab_id


def test_slab_ids_start_at_one_and_are_never_used_again() -> None:
    pool = allocator()
    first = grow(pool, 2 * MIB)
    assert first == 1
    pool.retire(first)
    pool.retired(first)
    assert grow(pool, 2 * MIB) == 2


def test_a_retiring_slab_gives_no_slots_and_keeps_its_bytes_until_it_is_gone() -> None:
    pool = allocator(64 * MIB + 4096)
    slab_id = grow(pool, 2 * MIB)
    first, second = pool.take("t", 2 * MIB, 2)
    pool.give(first)
    assert pool.retire(slab_id) == [second.slot]
    assert pool.free_slots("t", 2 * MIB) == 0
    assert pool.take("t", 2 * MIB, 1) == []
    assert pool.plan("u", 4096) is None
    with pytest.raises(AssertionError, match="1 slots in use"):
        pool.retired(slab_id)
    pool.give(second)
    assert pool.take("t", 2 * MIB, 1) == []
    assert pool.planned_bytes == 64 * MIB + 4096
    pool.retired(slab_id)
    assert pool.planned_bytes == pool.used_bytes == 0
    assert pool.plan("u", 4096) is not None


def test_steps_out_of_order_are_our_own_mistakes() -> None:
    pool = allocator()
    slab_id = grow(pool, 2 * MIB)
    making = pool.plan("t", 2 * MIB)
    assert making is not None
    for step, wrong in (
        (pool.made, slab_id),
        (pool.failed, slab_id),
        (pool.retired, slab_id),
        (pool.retire, making.slab_id),
        (pool.retired, making.slab_id),
        (pool.made, 99),
        (pool.retire, 99),
    ):
        with pytest.raises(AssertionError, match="slab"):
            step(wrong)


# -- slots ----------------------------------------------------------------------------------------------------


def test_a_slot_is_given_back_once() -> None:
    pool = allocator()
    slab_id = grow(pool, 2 * MIB)
    refs = pool.take("t", 2 * MIB, 3)
    pool.give(refs[1])
    with pytest.raises(AssertionError, match="already free"):
        pool.give(refs[1])
    with pytest.raises(AssertionError, match="already free"):
        pool.give(SlotRef(slab_id, 31))
    for slot in (-1, 32):
        with pytest.raises(AssertionError, match="has no slot"):
            pool.give(SlotRef(slab_id, slot))
    assert pool.used_bytes == 4 * MIB


def test_a_slot_of_a_slab_that_is_not_there_cannot_be_given_back() -> None:
    pool = allocator()
    slab = pool.plan("t", 2 * MIB)
    assert slab is not None
    with pytest.raises(AssertionError, match="still being made"):
        pool.give(SlotRef(slab.slab_id, 0))
    pool.failed(slab.slab_id)
    with pytest.raises(AssertionError, match="is gone"):
        pool.give(SlotRef(slab.slab_id, 0))


def test_a_slot_of_a_retiring_slab_is_given_back_once() -> None:
    pool = allocator()
    slab_id = grow(pool, 2 * MIB)
    (ref,) = pool.take("t", 2 * MIB, 1)
    pool.retire(slab_id)
    pool.give(ref)
    with pytest.raises(AssertionError, match="already free"):
        pool.give(ref)


def test_the_lowest_slots_come_first_so_that_a_batch_is_a_run() -> None:
    pool = allocator()
    grow(pool, 16 * KIB)
    refs = pool.take("t", 16 * KIB, 100)
    shuffled = refs[:]
    random.Random(1).shuffle(shuffled)
    for ref in shuffled:
        pool.give(ref)
    assert [slot for _, slot in pool.take("t", 16 * KIB, 4096)] == list(range(4096))


def test_a_take_gives_what_there_is() -> None:
    pool = allocator()
    grow(pool, 33 * MIB)
    grow(pool, 33 * MIB)
    assert len(pool.take("t", 33 * MIB, 5)) == 2
    assert pool.take("t", 33 * MIB, 5) == []
    assert pool.take("t", 33 * MIB, 0) == []
    assert pool.take("nobody", 33 * MIB, 1) == []


def test_tenants_and_sizes_never_share_a_slab() -> None:
    pool = allocator()
    mine, yours = grow(pool, 2 * MIB, "mine"), grow(pool, 2 * MIB, "yours")
    small = grow(pool, 16 * KIB, "mine")
    assert {slab_id for slab_id, _ in pool.take("mine", 2 * MIB, 99)} == {mine}
    assert {slab_id for slab_id, _ in pool.take("yours", 2 * MIB, 99)} == {yours}
    assert {slab_id for slab_id, _ in pool.take("mine", 16 * KIB, 99)} == {small}


def occupied(pool: SlabAllocator, counts: list[int]) -> list[int]:
    """Slabs of 32 slots of 2 MiB with so many in use; their ids."""
    ids = [grow(pool, 2 * MIB) for _ in counts]
    refs = pool.take("t", 2 * MIB, 32 * len(counts))
    for slab_id, count in zip(ids, counts, strict=True):
        for ref in [ref for ref in refs if ref.slab_id == slab_id][count:]:
            pool.give(ref)
    return ids


def test_the_fullest_slab_is_filled_first() -> None:
    pool = allocator(1 << 30)
    ids = occupied(pool, [10, 30, 20, 0])
    order = [pool.take("t", 2 * MIB, 1)[0].slab_id for _ in range(68)]
    assert order == [ids[1]] * 2 + [ids[2]] * 12 + [ids[0]] * 22 + [ids[3]] * 32


def test_a_batch_goes_whole_into_the_fullest_slab_that_holds_it() -> None:
    pool = allocator(1 << 30)
    ids = occupied(pool, [10, 30, 20, 0])
    assert pool.take("t", 2 * MIB, 12) == [SlotRef(ids[2], slot) for slot in range(20, 32)]


def test_an_empty_slab_is_opened_only_when_the_others_are_full() -> None:
    pool = allocator(1 << 30)
    ids = occupied(pool, [10, 30, 20, 0])
    refs = pool.take("t", 2 * MIB, 36)  # more than any touched slab has free, no more than all of them
    assert {ref.slab_id for ref in refs} == set(ids[:3])
    assert pool.slab(ids[3]).used == 0
    assert [ref.slab_id for ref in pool.take("t", 2 * MIB, 1)] == [ids[3]]


# -- room -----------------------------------------------------------------------------------------------------


def test_slabs_are_planned_until_the_pool_is_full() -> None:
    pool = allocator()
    fill(pool, 2 * MIB)
    assert [slab.geometry.slots for slab in pool.slabs()] == [32, 32, 32, 31]
    assert pool.planned_bytes <= 256 * MIB


@pytest.mark.parametrize("slot_bytes", [4 * KIB, 16 * KIB, 12 * KIB, 2 * MIB, 5 * MIB])
@pytest.mark.parametrize("capacity_bytes", [8 * MIB, 10 * MIB + 1, 63 * MIB, 64 * MIB, 64 * MIB + 4096, 100 * MIB])
def test_a_small_pool_serves_and_is_used_up(capacity_bytes: int, slot_bytes: int) -> None:
    pool = allocator(capacity_bytes)
    fill(pool, slot_bytes)
    taken = pool.take("t", slot_bytes, 1 << 30)
    assert capacity_bytes - 0.005 * capacity_bytes - slot_bytes - 8192 <= len(taken) * slot_bytes
    assert pool.planned_bytes <= capacity_bytes


@pytest.mark.parametrize("slot_bytes", [4 * KIB, 2 * MIB, 84 * MIB])
def test_one_slot_fits_exactly_or_not_at_all(slot_bytes: int) -> None:
    assert allocator(4096 + slot_bytes - 1).plan("t", slot_bytes) is None
    slab = allocator(4096 + slot_bytes).plan("t", slot_bytes)
    assert slab is not None
    assert slab.geometry.slots == 1
    assert allocator(0).plan("t", slot_bytes) is None


def test_a_cut_slab_is_as_large_as_fits() -> None:
    for room in range(64 * KIB, 512 * KIB, 4 * KIB + 512):
        slab = allocator(room).plan("t", 4 * KIB)
        assert slab is not None
        assert slab.geometry.segment_bytes <= room < slab.geometry.segment_bytes + 8 * KIB


def test_donors_are_empty_ones_then_those_with_the_fewest_used_bytes() -> None:
    pool = allocator(1 << 30)
    busy, light, empty, spare = occupied(pool, [30, 2, 0, 0])
    small = grow(pool, 16 * KIB, "other")
    pool.take("other", 16 * KIB, 100)
    large = grow(pool, 84 * MIB, "other")
    mine = grow(pool, 33 * MIB, "t")
    pool.plan("other", 2 * MIB)
    pool.retire(spare)
    assert [slab.slab_id for slab in pool.donors("t", 33 * MIB)] == [large, empty, small, light, busy]
    assert mine in [slab.slab_id for slab in pool.donors("other", 33 * MIB)]


def test_classes_that_are_gone_leave_nothing_behind() -> None:
    pool = allocator()
    for number in range(100):
        slab_id = grow(pool, 2 * MIB, f"tenant {number}")
        pool.retire(slab_id)
        pool.retired(slab_id)
    assert not pool._classes


# -- a pool whose block size changes --------------------------------------------------------------------------


class Engine:
    """Drives an allocator as the engine does: where a class finds no slot, donors are emptied and retired."""

    def __init__(self, capacity_bytes: int) -> None:
        self.pool = allocator(capacity_bytes)
        self.held: set[SlotRef] = set()
        self.pinned: set[SlotRef] = set()

    def put(self, slot_bytes: int, tenant: str = "t") -> bool:
        """Store one block, if room can be made without evicting one of the same class."""
        while True:
            refs = self.pool.take(tenant, slot_bytes, 1)
            if refs:
                assert not self.held & set(refs)
                self.held.update(refs)
                return True
            slab = self.pool.plan(tenant, slot_bytes)
            if slab is not None:
                self.pool.made(slab.slab_id)
            elif not self.take_a_slab_away(tenant, slot_bytes):
                return False

    def take_a_slab_away(self, tenant: str, slot_bytes: int) -> bool:
        """Evict what the best donor without pins holds, and unmap it."""
        for slab in self.pool.donors(tenant, slot_bytes):
            if not any(ref.slab_id == slab.slab_id for ref in self.pinned):
                for slot in self.pool.retire(slab.slab_id):
                    self.held.remove(SlotRef(slab.slab_id, slot))
                    self.pool.give(SlotRef(slab.slab_id, slot))
                self.pool.retired(slab.slab_id)
                return True
        return False

    def put_all(self, slot_bytes: int) -> int:
        """Fill the pool with blocks of one size; how many it holds then."""
        while self.put(slot_bytes):
            pass
        return sum(self.pool.slab(ref.slab_id).geometry.slot_bytes == slot_bytes for ref in self.held)


SIZES = (16 * KIB, 2 * MIB, 33 * MIB, 84 * MIB)


@pytest.mark.parametrize(
    "order",
    [SIZES, SIZES[::-1], (2 * MIB, 84 * MIB, 16 * KIB, 33 * MIB, 2 * MIB, 33 * MIB, 16 * KIB, 84 * MIB)],
    ids=["growing", "shrinking", "mixed"],
)
def test_the_pool_follows_a_change_of_block_size_for_ever(order: tuple[int, ...]) -> None:
    """Calcification: memory that once went to a size class serves no other. Here every phase gets all of it."""
    expected = {2 * MIB: 127, 33 * MIB: 7, 84 * MIB: 3}
    engine = Engine(256 * MIB)
    for slot_bytes in order * 3:
        count = engine.put_all(slot_bytes)
        if slot_bytes in expected:
            assert count == expected[slot_bytes]
        else:
            assert count * slot_bytes >= 0.995 * 256 * MIB
        assert engine.pool.planned_bytes <= 256 * MIB
        assert engine.pool.used_bytes == count * slot_bytes
        assert len(engine.held) == count
        assert len(list(engine.pool.slabs())) <= 40


def test_a_mixed_load_starves_no_class() -> None:
    engine = Engine(256 * MIB)
    for slot_bytes in SIZES * 20:
        assert engine.put(slot_bytes)
    present = {engine.pool.slab(ref.slab_id).geometry.slot_bytes for ref in engine.held}
    assert 84 * MIB in present
    assert len(present) >= 2


def test_pinned_slabs_are_worked_around() -> None:
    engine = Engine(256 * MIB)
    engine.put_all(2 * MIB)
    engine.pinned = {min(engine.held)}
    kept = engine.pool.slab(min(engine.held).slab_id)
    assert engine.put_all(84 * MIB) == 2  # 192 MiB are left beside the pinned slab of 64
    assert kept.used == kept.geometry.slots
    engine.pinned = set()
    assert engine.put_all(33 * MIB) == 7


def test_tenants_hand_the_pool_over() -> None:
    engine = Engine(64 * MIB)
    for tenant in ("a", "b", "c", "a"):
        while engine.put(2 * MIB, tenant):
            pass
        assert {slab.tenant for slab in engine.pool.slabs()} == {tenant}
        assert len(engine.held) == 31
