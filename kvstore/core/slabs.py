"""Where blocks lie in the warm pool: slabs of one tenant and one size class each, cut into equal slots.

Decides only; the engine makes and unmaps the segments. Call sequence of a slab:

    plan() -> MAKING -> made() -> LIVE -> retire() -> RETIRING -> retired() -> forgotten
                     -> failed() -> forgotten

A segment counts against the capacity from plan() until failed() or retired(), so that capacity is never
exceeded in any state. Slab ids start at 1 (0 is a session's staging segment) and are never used again.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from itertools import repeat
from typing import NamedTuple

from kvstore.core.numbers import numbers
from kvstore.protocol.slab import GENERATION_BYTES, HEADER_BYTES, SlabGeometry


class SlotRef(NamedTuple):
    """A slot of a slab."""

    slab_id: int
    slot: int


# 0.12 us a slot; SlotRef(a, b) takes 0.30 us, and a batch takes thousands at once.
_slot_ref = partial(tuple.__new__, SlotRef)


class SlabState(Enum):
    """Where a slab is in its life."""

    MAKING = "making"
    LIVE = "live"
    RETIRING = "retiring"


@dataclass(slots=True, eq=False)
class Slab:
    """A slab as the allocator sees it.

    Attributes:
        slab_id: its number, never used again.
        tenant: owner of every block in it.
        geometry: how it is cut.
        state: see the module.
        free: numbers of its free slots, highest first: the lowest is handed out first, from the end, so that a
            batch gets runs and the slab's tail stays empty. Empty while MAKING.
        used: number of slots handed out.
    """

    slab_id: int
    tenant: str
    geometry: SlabGeometry
    state: SlabState = SlabState.MAKING
    free: list[int] = field(default_factory=list)
    used: int = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots that are handed out."""
        return self.used * self.geometry.slot_bytes


@dataclass(slots=True)
class _SizeClass:
    """LIVE slabs of one tenant and slot size that have free slots, as sorted (free slots, slab id) pairs.

    The touched ones stand apart: an empty slab is opened last, so that it can be retired.
    """

    touched: list[tuple[int, int]] = field(default_factory=list)
    empty: list[tuple[int, int]] = field(default_factory=list)
    free: int = 0  # slots of the listed slabs
    slabs: int = 0  # in any state, listed or not

    def enter(self, slab: Slab) -> None:
        """List a slab; it must have been removed before its counts changed."""
        if slab.free:
            order = self.touched if slab.used else self.empty
            entry = (len(slab.free), slab.slab_id)
            order.insert(bisect_left(order, entry), entry)
            self.free += len(slab.free)

    def remove(self, slab: Slab) -> None:
        """Take a slab off the list, with the counts it was entered with."""
        if slab.free:
            order = self.touched if slab.used else self.empty
            entry = (len(slab.free), slab.slab_id)
            at = bisect_left(order, entry)
            assert order[at] == entry, f"slab {slab.slab_id} changed while it was listed"
            del order[at]
            self.free -= len(slab.free)

    def choose(self, wanted: int) -> int | None:
        """Slab for the next slots: the fullest that holds them all, else the fullest; an empty one only at the end."""
        for order, otherwise in ((self.touched, 0), (self.empty, -1)):
            if order:
                at = bisect_left(order, (wanted, 0))
                return order[at if at < len(order) else otherwise][1]
        return None


class SlabAllocator:
    """Slots of the warm pool.

    Every method is O(log slabs) a call and O(1) a slot, but `plan` and the listing ones; giving a slot back also
    moves at most 128 KiB of its slab's list of free slots (a few us).
    """

    def __init__(self, capacity_bytes: int, target_bytes: int) -> None:
        """A pool of `capacity_bytes`, in slabs of about `target_bytes`."""
        self.capacity_bytes = capacity_bytes
        self.target_bytes = target_bytes
        self._slabs: dict[int, Slab] = {}
        self._classes: dict[tuple[str, int], _SizeClass] = {}
        self._next_id = 1
        self._planned_bytes = 0
        self._used_bytes = 0

    @property
    def planned_bytes(self) -> int:
        """Segment bytes of all slabs, whatever their state; at most the capacity."""
        return self._planned_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of all slots that are handed out."""
        return self._used_bytes

    # -- the life of a slab -----------------------------------------------------------------------------------

    def plan(self, tenant: str, slot_bytes: int) -> Slab | None:
        """Register one more slab of the class as MAKING; None where not even one slot has room.

        Where a whole slab does not fit, it gets fewer slots: a pool smaller than one slab serves too. The caller
        makes the segment and answers with `made` or `failed`.
        """
        geometry = self._fitting(slot_bytes, self.capacity_bytes - self._planned_bytes)
        if geometry is None:
            return None
        slab = Slab(self._next_id, tenant, geometry)
        self._next_id += 1
        self._slabs[slab.slab_id] = slab
        self._classes.setdefault((tenant, slot_bytes), _SizeClass()).slabs += 1
        self._planned_bytes += geometry.segment_bytes
        return slab

    def made(self, slab_id: int) -> None:
        """MAKING to LIVE, with all slots free."""
        slab = self._in_state(slab_id, SlabState.MAKING)
        slab.state = SlabState.LIVE
        slab.free = numbers(slab.geometry.slots)[slab.geometry.slots - 1 :: -1]
        self._class_of(slab).enter(slab)

    def failed(self, slab_id: int) -> None:
        """The segment of a MAKING slab could not be made: forget it."""
        self._forget(self._in_state(slab_id, SlabState.MAKING))

    def retire(self, slab_id: int) -> list[int]:
        """LIVE to RETIRING: no slot of it is handed out any more.

        Returns:
            The slots still in use, lowest first. Each must be given back before `retired`.
        """
        slab = self._in_state(slab_id, SlabState.LIVE)
        self._class_of(slab).remove(slab)
        slab.state = SlabState.RETIRING
        free = set(slab.free)
        return [slot for slot in range(slab.geometry.slots) if slot not in free]

    def retired(self, slab_id: int) -> None:
        """All slots of a RETIRING slab are free and its segment is gone: its bytes are there for another."""
        slab = self._in_state(slab_id, SlabState.RETIRING)
        assert slab.used == 0, f"slab {slab_id} was unmapped with {slab.used} slots in use"
        self._forget(slab)

    # -- slots ------------------------------------------------------------------------------------------------

    def take(self, tenant: str, slot_bytes: int, count: int) -> list[SlotRef]:
        """Up to `count` free slots, as few as there are.

        They come from the fullest slab that holds them all, else from the fullest ones; empty slabs are opened
        last. Within a slab the lowest slots come first, in order.
        """
        size_class = self._classes.get((tenant, slot_bytes))
        refs: list[SlotRef] = []
        while size_class is not None and len(refs) < count:
            slab_id = size_class.choose(count - len(refs))
            if slab_id is None:
                break
            slab = self._slabs[slab_id]
            size_class.remove(slab)
            taken = min(count - len(refs), len(slab.free))
            refs.extend(map(_slot_ref, zip(repeat(slab_id), slab.free[: -taken - 1 : -1])))
            del slab.free[-taken:]
            slab.used += taken
            size_class.enter(slab)
        self._used_bytes += len(refs) * slot_bytes
        return refs

    def give(self, ref: SlotRef) -> int:
        """A slot is FREE again; in a LIVE slab it may be handed out at once. Returns how many of its slab are not."""
        slab_id, slot = ref
        slab = self._slabs.get(slab_id)
        assert slab is not None, f"slot {ref} is given back to a slab that is gone"
        assert slab.state is not SlabState.MAKING, f"slot {ref} is given back to a slab that is still being made"
        geometry, free = slab.geometry, slab.free
        assert 0 <= slot < geometry.slots, f"slab {slab_id} has no slot {slot}"
        at = bisect_left(free, -slot, key=operator.neg)
        assert at == len(free) or free[at] != slot, f"slot {ref} is given back and is already free"
        size_class = self._class_of(slab) if slab.state is SlabState.LIVE else None
        if size_class is not None:
            size_class.remove(slab)
        free.insert(at, slot)
        slab.used -= 1
        if size_class is not None:
            size_class.enter(slab)
        self._used_bytes -= geometry.slot_bytes
        return slab.used

    # -- what there is ----------------------------------------------------------------------------------------

    def free_slots(self, tenant: str, slot_bytes: int) -> int:
        """Slots that `take` could hand out now."""
        size_class = self._classes.get((tenant, slot_bytes))
        return size_class.free if size_class is not None else 0

    def donors(self, tenant: str, slot_bytes: int) -> list[Slab]:
        """LIVE slabs of other classes, best to retire first: for when this class has no slot and plan() says None.

        Empty ones first, then those with the fewest used bytes; of equals the largest, which gives most room.
        """
        others = [
            slab
            for slab in self._slabs.values()
            if slab.state is SlabState.LIVE and (slab.tenant, slab.geometry.slot_bytes) != (tenant, slot_bytes)
        ]
        return sorted(others, key=lambda slab: (slab.used_bytes, -slab.geometry.segment_bytes, slab.slab_id))

    def slab(self, slab_id: int) -> Slab:
        """The slab of that number; KeyError where there is none (any more)."""
        return self._slabs[slab_id]

    def slabs(self) -> Iterator[Slab]:
        """All slabs in any state, oldest first. Plan, fail or retire none while iterating."""
        return iter(self._slabs.values())

    # -- inside -----------------------------------------------------------------------------------------------

    def _fitting(self, slot_bytes: int, room_bytes: int) -> SlabGeometry | None:
        whole = SlabGeometry.for_class(slot_bytes, self.target_bytes)
        if whole.segment_bytes <= room_bytes:
            return whole
        slots = (room_bytes - HEADER_BYTES) // (slot_bytes + GENERATION_BYTES)
        while slots >= 1:  # twice at most: the header is rounded up by less than a slot
            cut = SlabGeometry.for_class(slot_bytes, slots * slot_bytes)
            if cut.segment_bytes <= room_bytes:
                return cut
            slots -= 1
        return None

    def _in_state(self, slab_id: int, state: SlabState) -> Slab:
        slab = self._slabs.get(slab_id)
        assert slab is not None, f"there is no slab {slab_id}"
        assert slab.state is state, f"slab {slab_id} is {slab.state.name}, not {state.name}"
        return slab

    def _class_of(self, slab: Slab) -> _SizeClass:
        return self._classes[slab.tenant, slab.geometry.slot_bytes]

    def _forget(self, slab: Slab) -> None:
        del self._slabs[slab.slab_id]
        self._planned_bytes -= slab.geometry.segment_bytes
        size_class = self._class_of(slab)
        size_class.slabs -= 1
        if not size_class.slabs:  # tenants and layouts come and go for as long as the daemon runs
            del self._classes[slab.tenant, slab.geometry.slot_bytes]
