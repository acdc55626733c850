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

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Protocol

from kvstore.core.slabs import SlabAllocator, SlotRef

if TYPE_CHECKING:
    from kvstore.core.block import Namespace

# A third of what SlotRef(a, b) costs, three times for every block that comes and goes.
_slot_ref = partial(tuple.__new__, SlotRef)
_SLAB_ID = attrgetter("slab_id")


class SlotState(IntEnum):
    """Where a slot is in its life."""

    FREE = 0
    FILLING = 1
    READY = 2
    RETIRING = 3


class Owner(Protocol):
    """Who fills a slot, or the block that lies in it."""

    @property
    def namespace(self) -> Namespace:
        """Whose bytes they are."""


class Slot:
    """A slot that is not FREE. Slots that were filled together share `base`: an integer takes 32 bytes."""

    __slots__ = ("base", "index", "owner", "pins", "slab_id", "state")

    def __init__(self, ref: SlotRef, base: int, owner: Owner) -> None:
        self.slab_id = ref.slab_id
        self.index = ref.slot
        self.base = base
        self.state = SlotState.FILLING
        self.pins = 0
        self.owner = owner  # a Block once READY

    @property
    def ref(self) -> SlotRef:
        """Its place."""
        return _slot_ref((self.slab_id, self.index))

    @property
    def generation(self) -> int:
        """The number that readers were promised."""
        return self.base + self.index


class SlotTable:
    """All slots that are not FREE, by slab."""

    def __init__(self, allocator: SlabAllocator, set_generation: Callable[[SlotRef, int], None]) -> None:
        """`set_generation` writes into the slab header; it must be visible to readers when it returns."""
        self._allocator = allocator
        self._set_generation = set_generation
        self._by_slab: dict[int, list[Slot | None]] = {}  # by number: 8 bytes a slot, where a dict takes 36
        self._next_generation = 1
        self.filling = 0  # number of slots that are FILLING
        self.freed: Callable[[Slot], None] | None = None  # told after a slot became FREE

    def fill(self, refs: Sequence[SlotRef], owner: Owner) -> list[Slot]:
        """FREE to FILLING. The generation is settled now, so that a lease can be promised it before it is readable."""
        found: list[Slot] = []
        for slab_id, together in groupby(refs, _SLAB_ID):
            slots = self._by_slab.get(slab_id)
            if slots is None:
                slots = self._by_slab[slab_id] = [None] * self._allocator.slab(slab_id).geometry.slots
            base = self._next_generation
            self._next_generation += len(slots)
            for ref in together:
                assert slots[ref.slot] is None, f"slot {ref} is given to two fillers"
                slot = slots[ref.slot] = Slot(ref, base, owner)
                found.append(slot)
        self.filling += len(found)
        return found

    def publish(self, slot: Slot, owner: Owner) -> None:
        """FILLING to READY: the filler has answered that every byte is there."""
        assert slot.state is SlotState.FILLING, f"publish of a slot that is {slot.state.name}"
        self.filling -= 1
        slot.owner = owner
        slot.state = SlotState.READY
        self._set_generation(slot.ref, slot.base + slot.index)

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
        return [slot for slot in self._by_slab.get(slab_id, ()) if slot is not None]

    def _free(self, slot: Slot) -> None:
        # Invalid before the allocator can give it to the next filler.
        ref = slot.ref
        self._set_generation(ref, 0)
        slot.state = SlotState.FREE
        slot.pins = 0
        self._by_slab[slot.slab_id][slot.index] = None
        if not self._allocator.give(ref):
            del self._by_slab[slot.slab_id]
        if self.freed is not None:
            self.freed(slot)
