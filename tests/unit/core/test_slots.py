"""A slot's life, rule by rule: FREE, FILLING, READY, RETIRING, and what readers in other processes see of it."""

from __future__ import annotations

import pytest

from kvstore.core.slabs import SlabAllocator, SlotRef
from kvstore.core.slots import Slot, SlotState, SlotTable

PAGE = 4096
OWNER = object()


class Pool:
    """A slab of four slots, and every write of a generation in order."""

    def __init__(self) -> None:
        self.allocator = SlabAllocator(8 * PAGE, 4 * PAGE)
        slab = self.allocator.plan("t", PAGE)
        assert slab is not None
        self.allocator.made(slab.slab_id)
        self.slab_id = slab.slab_id
        self.writes: list[tuple[SlotRef, int]] = []
        self.free_at_write: list[int] = []
        self.freed: list[Slot] = []
        self.table = SlotTable(self.allocator, self._set_generation)
        self.table.freed = self.freed.append

    def _set_generation(self, ref: SlotRef, value: int) -> None:
        self.writes.append((ref, value))
        self.free_at_write.append(self.free)

    @property
    def free(self) -> int:
        return self.allocator.free_slots("t", PAGE)

    def fill(self) -> Slot:
        return self.table.fill(self.allocator.take("t", PAGE, 1), OWNER)[0]

    def ready(self) -> Slot:
        slot = self.fill()
        self.table.publish(slot, OWNER)
        return slot


@pytest.fixture
def pool() -> Pool:
    return Pool()


def test_free_is_given_to_one_filler(pool: Pool) -> None:
    slot = pool.fill()
    assert slot.state is SlotState.FILLING
    assert (pool.free, pool.table.filling) == (3, 1)
    with pytest.raises(AssertionError, match="two fillers"):
        pool.table.fill([slot.ref], OWNER)


def test_filling_is_invisible(pool: Pool) -> None:
    pool.fill()
    assert pool.writes == []


def test_the_generation_is_promised_before_the_slot_is_readable(pool: Pool) -> None:
    slot = pool.fill()
    promised = slot.generation
    pool.table.publish(slot, OWNER)
    assert pool.writes == [(slot.ref, promised)]
    assert slot.generation == promised > 0


def test_publish_makes_it_ready_and_changes_its_owner(pool: Pool) -> None:
    slot, block = pool.fill(), object()
    pool.table.publish(slot, block)
    assert (slot.state, slot.owner, pool.table.filling) == (SlotState.READY, block, 0)


def test_a_filler_that_failed_leaves_it_free_and_invalid(pool: Pool) -> None:
    slot = pool.fill()
    pool.table.abandon(slot)
    assert slot.state is SlotState.FREE
    assert (pool.free, pool.table.filling, pool.freed) == (4, 0, [slot])
    assert pool.writes == [(slot.ref, 0)]


def test_ready_without_pins_is_freed(pool: Pool) -> None:
    slot = pool.ready()
    pool.table.retire(slot)
    assert (slot.state, pool.free, pool.freed) == (SlotState.FREE, 4, [slot])


def test_the_generation_is_0_before_the_allocator_can_hand_the_slot_out_again(pool: Pool) -> None:
    slot = pool.ready()
    pool.table.retire(slot)
    assert pool.writes[-1] == (slot.ref, 0)
    assert pool.free_at_write[-1] == 3  # not free yet when it was written
    assert pool.free == 4


def test_ready_with_pins_becomes_retiring_and_keeps_its_generation(pool: Pool) -> None:
    slot = pool.ready()
    slot.pins = 2
    pool.table.retire(slot)
    assert slot.state is SlotState.RETIRING
    assert pool.writes == [(slot.ref, slot.generation)]
    assert (pool.free, pool.freed) == (3, [])


def test_retiring_waits_for_its_last_pin(pool: Pool) -> None:
    slot = pool.ready()
    slot.pins = 2
    pool.table.retire(slot)
    pool.table.unpin(slot)
    assert slot.state is SlotState.RETIRING
    pool.table.unpin(slot)
    assert slot.state is SlotState.FREE
    assert pool.freed == [slot]


def test_unpinning_a_ready_slot_keeps_it(pool: Pool) -> None:
    slot = pool.ready()
    slot.pins = 1
    pool.table.unpin(slot)
    assert (slot.state, slot.pins) == (SlotState.READY, 0)


def test_unpinning_a_filling_slot_keeps_it(pool: Pool) -> None:
    slot = pool.fill()
    slot.pins = 1
    pool.table.unpin(slot)
    assert (slot.state, pool.table.filling) == (SlotState.FILLING, 1)


def test_pins_on_a_slot_whose_filler_failed_are_void(pool: Pool) -> None:
    slot = pool.fill()
    slot.pins = 2
    pool.table.abandon(slot)
    again = pool.fill()
    assert again.ref == slot.ref
    again.pins = 1
    pool.table.unpin(slot)
    pool.table.unpin(slot)
    assert (slot.pins, again.pins, again.state) == (0, 1, SlotState.FILLING)


def test_there_is_no_pin_to_give_back_twice(pool: Pool) -> None:
    slot = pool.ready()
    with pytest.raises(AssertionError, match="without pins"):
        pool.table.unpin(slot)


def test_a_generation_is_never_used_again(pool: Pool) -> None:
    seen = []
    for turn in range(20):
        slot = pool.fill()
        seen.append(slot.generation)
        if turn % 3:
            pool.table.publish(slot, OWNER)
            pool.table.retire(slot)
        else:
            pool.table.abandon(slot)
    assert len(set(seen)) == len(seen)
    assert 0 not in seen


@pytest.mark.parametrize("step", ["publish", "abandon"])
def test_only_a_filling_slot_is_published_or_abandoned(pool: Pool, step: str) -> None:
    slot = pool.ready()
    with pytest.raises(AssertionError, match=f"{step} of a slot that is READY"):
        if step == "publish":
            pool.table.publish(slot, OWNER)
        else:
            pool.table.abandon(slot)


def test_only_a_ready_slot_is_retired(pool: Pool) -> None:
    with pytest.raises(AssertionError, match="retire of a slot that is FILLING"):
        pool.table.retire(pool.fill())
    slot = pool.ready()
    slot.pins = 1
    pool.table.retire(slot)
    with pytest.raises(AssertionError, match="retire of a slot that is RETIRING"):
        pool.table.retire(slot)


def test_the_slots_of_a_slab_are_those_that_are_not_free(pool: Pool) -> None:
    filling, ready, retiring, free = pool.fill(), pool.ready(), pool.ready(), pool.ready()
    retiring.pins = 1
    pool.table.retire(retiring)
    pool.table.retire(free)
    assert set(pool.table.in_slab(pool.slab_id)) == {filling, ready, retiring}
    assert pool.table.in_slab(pool.slab_id + 1) == []
