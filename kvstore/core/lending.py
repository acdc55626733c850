"""Memory that changes hands: slabs from one class to another, and what has to give way where nothing else may."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING

from kvstore.core.block import PINNED, WARM, Block, Namespace
from kvstore.core.fair import payers
from kvstore.core.slots import Slot, SlotState

if TYPE_CHECKING:
    from kvstore.core.residency import Residency

_FORCE_LOOK = 16_384  # slots or blocks, with the engine's lock held: a millisecond

ClassKey = tuple[str, int]  # tenant, slot bytes


class Lending:
    """Finds whole slabs, or single blocks, that can be emptied although they are not the next victims."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._cursors: dict[ClassKey, Iterator[Slot]] = {}

    def reclaim_slab(self, tenant: str, slot_size: int, lender: ClassKey | None = None) -> int | None:
        """Empty a slab of another class (of `lender`, if given) and start to retire it; returns its id.

        The engine unmaps it and calls `allocator.retired`. None where every such slab is in use, or its tenant's share.
        """
        asked = self._payers_warm(tenant, slot_size)
        # What is pinned goes with a slab only where there is no other, and never so that a class has one more.
        for pins in (False,) if lender is not None else (False, True):
            for slab in self._residency.allocator.donors(tenant, slot_size):
                if lender is not None and (slab.tenant, slab.geometry.slot_bytes) != lender:
                    continue
                slots = self._residency.slots.in_slab(slab.slab_id)
                if (slab.tenant in asked or not slots) and all(self._may_be_moved(slot, pins) for slot in slots):
                    self._empty(slots)
                    self._residency.allocator.retire(slab.slab_id)
                    return slab.slab_id
        return None

    def _empty(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            if slot.state != SlotState.FREE:  # it may have gone with an earlier one's subtree
                self._drop_with_subtree(slot)

    def lender(self, borrower: ClassKey) -> ClassKey | None:
        """A class whose next victim has been unused for much longer than the borrower's, or None.

        Without this a class that has a slab of its own would turn it over for ever beside memory that lies idle.
        """
        now = self._residency.clock
        asked = self._payers_warm(*borrower)
        idle = self._residency.orders.idle_since(self._residency.may_leave_warm)
        ages = {place[1:]: now - stamp for place, stamp in idle.items() if place.tenant in asked}
        mine = ages.pop(borrower, 0)
        oldest = max(ages, key=ages.__getitem__, default=None)
        # By half as much again: two equally busy classes must not pass one slab to and fro.
        return oldest if oldest is not None and ages[oldest] > 1.5 * mine else None

    def _payers_warm(self, tenant: str, slot_size: int) -> list[str]:
        budget = self._residency.budgets[WARM]
        return payers(budget.by_tenant, budget.capacity_bytes, tenant, slot_size)

    def _cursor(self, key: ClassKey) -> Iterator[Slot]:
        """The slots of a class, from where the last look ended, and then once more from the start."""
        for _ in range(2):
            if key not in self._cursors:
                slabs = self._residency.allocator.slabs()
                mine = [slab.slab_id for slab in slabs if (slab.tenant, slab.geometry.slot_bytes) == key]
                # No generator: that would end with the caller's loop.
                self._cursors[key] = chain.from_iterable(map(self._residency.slots.in_slab, mine))
            yield from self._cursors[key]
            del self._cursors[key]

    def _may_be_moved(self, slot: Slot, pins: bool = True) -> bool:
        """`pins`: also what is pinned softly."""
        block = slot.owner
        if slot.state != SlotState.READY or slot.pins or not isinstance(block, Block) or block.saving:
            return False
        if block.level == PINNED and not pins:
            return False
        if block.copies != WARM or block.below is None:
            return True
        return not any(
            below.saving
            or (below.level == PINNED and not pins)
            or (below.slot is not None and (below.slot.pins or below.slot.state != SlotState.READY))
            for below in block.subtree()
        )

    def _drop_with_subtree(self, slot: Slot) -> None:
        block = slot.owner
        assert isinstance(block, Block)
        if block.copies != WARM or block.below is None:
            self._residency.evict_warm(block)
        else:
            self._residency.dropped_unsaved += 1
            self._residency.forget_all(block.subtree())

    def force(self, namespace: Namespace, own: bool) -> bool:
        """Drop a block although it is nobody's turn: no leaf may leave. `own`: one of the namespace itself.

        First one that another tier has too: a prefix longer than warm is stored with its end pinned, and all the rest
        hangs on that. Else one that has to be saved first, with what hangs on it below: where cold is down or takes
        nothing, warm would stay full of parents whose children are in cold until that is mended.
        """
        key = (namespace.tenant, namespace.slot_bytes)
        for slot in islice(self._cursor(key), _FORCE_LOOK):
            block = slot.owner
            if slot.pins or slot.state != SlotState.READY or not isinstance(block, Block) or block.slot is not slot:
                continue
            if own and block.namespace is not namespace:
                continue
            if block.copies != WARM and not block.saving:
                self._residency.evict_warm(block)
                return True
        for dirty in islice(self._residency.dirty, _FORCE_LOOK):
            held, other = dirty.slot, dirty.namespace
            if own and other is not namespace:
                continue
            if (other.tenant, other.slot_bytes) == key and held is not None and self._may_be_moved(held):
                self._drop_with_subtree(held)
                return True
        return False
