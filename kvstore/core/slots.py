"""A slot's life: FREE, FILLING, READY, RETIRING. The one place that changes a slot's state.

| state    | who may touch the bytes                              | leaves it when |
|----------|------------------------------------------------------|----------------|
| FREE     | nobody                                               | given to one filler |
| FILLING  | that filler alone (a put's copy, or an agent)        | the filler answers, or has been reaped |
| READY    | readers (leases, and agents that copy from it: pins) | freed with no pins |
| RETIRING | those who already read it, nobody new                | its last pin has gone |

A FREE slot has no record here: the allocator has it. The generation in shared memory is 0 outside READY and
RETIRING; it is written before the allocator can hand the slot out again.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import partial

from kvstore.core.slabs import SlabAllocator, SlotRef

# A third of what SlotRef(a, b) costs, three times for every block that comes and goes.
_slot_ref = partial(tuple.__new__, SlotRef)


class SlotState(IntEnum):
    """Where a slot is in its life."""

    FREE = 0
    FILLING = 1
    READY = 2
    RETIRING = 3


class Slot:
    """A slot that is not FREE. `generation` is the number that readers were promised."""

    __slots__ = ("generation", "index", "owner", "pins", "slab_id", "state")

    def __init__(self, ref: SlotRef, generation: int, owner: object) -> None:
        self.slab_id = ref.slab_id
        self.index = ref.slot
        self.generation = generation
        self.state = SlotState.FILLING
        self.pins = 0
        self.owner: object = owner  # a Block once READY

    @property
    def ref(self) -> SlotRef:
        """Its place."""
        return _slot_ref((self.slab_id, self.index))


class SlotTable:
    """All slots that are not FREE, by slab."""

    def __init__(self, allocator: SlabAllocator, set_generation: Callable[[SlotRef, int], None]) -> None:
        """`set_generation` writes into the slab header; it must be visible to readers when it returns."""
        self._allocator = allocator
        self._set_generation = set_generation
        self._by_slab: dict[int, dict[int, Slot]] = {}
        self._last_generation = 0
        self.filling = 0  # number of slots that are FILLING
        self.freed: Callable[[Slot], None] | None = None  # told after a slot became FREE

    def fill(self, ref: SlotRef, owner: object) -> Slot:
        """FREE to FILLING. The generation is settled now, so that a lease can be promised it before it is readable."""
        self._last_generation += 1
        slot = Slot(ref, self._last_generation, owner)
        slots = self._by_slab.setdefault(ref.slab_id, {})
        assert ref.slot not in slots, f"slot {ref} is given to two fillers"
        slots[ref.slot] = slot
        self.filling += 1
        return slot

    def publish(self, slot: Slot, owner: object) -> None:
        """FILLING to READY: the filler has answered that every byte is there."""
        assert slot.state is SlotState.FILLING, f"publish of a slot that is {slot.state.name}"
        self.filling -= 1
        slot.owner = owner
        slot.state = SlotState.READY
        self._set_generation(slot.ref, slot.generation)

    def abandon(self, slot: Slot) -> None:
        """FILLING to FREE: the filler has answered that it failed, or has been reaped."""
        assert slot.state is SlotState.FILLING, f"abandon of a slot that is {slot.state.name}"
        self.filling -= 1
        self._free(slot)

    def retire(self, slot: Slot) -> None:
        """READY to FREE, or to RETIRING while somebody still reads it."""
        assert slot.state is SlotState.READY, f"retire of a slot that is {slot.state.name}"
        if slot.pins:
            slot.state = SlotState.RETIRING
        else:
            self._free(slot)

    def unpin(self, slot: Slot) -> None:
        """One reader has ended. Pins on a slot whose filler failed are already void."""
        if slot.state is SlotState.FREE:
            return
        assert slot.pins > 0, "unpin of a slot without pins"
        slot.pins -= 1
        if slot.pins == 0 and slot.state is SlotState.RETIRING:
            self._free(slot)

    def in_slab(self, slab_id: int) -> list[Slot]:
        """The slots of a slab that are not FREE."""
        return list(self._by_slab.get(slab_id, {}).values())

    def _free(self, slot: Slot) -> None:
        # Invalid before the allocator can give it to the next filler.
        self._set_generation(slot.ref, 0)
        slot.state = SlotState.FREE
        slot.pins = 0
        slots = self._by_slab[slot.slab_id]
        del slots[slot.index]
        if not slots:
            del self._by_slab[slot.slab_id]
        self._allocator.give(slot.ref)
        if self.freed is not None:
            self.freed(slot)
