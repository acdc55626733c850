"""Storing new blocks: begin gives slots, the engine copies, finish publishes.

Nothing of a put is visible before finish: not in the index, and in no slot that a reader could name. Two sessions
that put the same key at once both copy; the second to finish is told EXISTS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from kvstore.core.block import COLD, WARM, Block, Namespace
from kvstore.core.index import Index
from kvstore.core.residency import Residency
from kvstore.core.slots import Slot
from kvstore.core.terms import pin


class PutStatus(IntEnum):
    """What became of one block; the numbers of kvstore.v1.PutStatus."""

    STORED = 1
    EXISTS = 2
    REJECTED = 3


class Reject(IntEnum):
    """Why a block was not stored; the numbers of kvstore.v1.RejectReason."""

    NONE = 0
    NO_ROOM = 1
    NO_PARENT = 2
    STAGING_BUSY = 3
    DEADLINE = 4
    CHECKSUM = 5
    QUOTA = 6
    UNAVAILABLE = 7
    DRAINING = 8
    CLEARED = 9
    NOT_ADMITTED = 10


@dataclass(slots=True, eq=False)
class PutItem:
    """One block of a put. `slot` is FILLING and the put's own from begin to finish."""

    key: bytes
    parent: bytes
    status: PutStatus = PutStatus.REJECTED
    reason: Reject = Reject.NONE
    slot: Slot | None = None
    passes: bool = False  # through warm, on its way to cold
    checksum: bytes = b""  # set by the engine once it copied and hashed


@dataclass(slots=True)
class PutPlan:
    """A put between begin and finish."""

    namespace: Namespace
    epoch: int
    pin: bool = False
    items: list[PutItem] = field(default_factory=list)
    held: Slot | None = None  # of the deepest block that is stored already


class Puts:
    """The put side of the core."""

    def __init__(self, index: Index, residency: Residency) -> None:
        self._index = index
        self._residency = residency
        self.stored = 0
        self.exists = 0
        self.rejected: dict[Reject, int] = {}

    def begin(self, namespace: Namespace, parent: bytes, keys: Sequence[bytes], pin: bool = False) -> PutPlan:
        """Settle what can be settled without the bytes, and take slots for the rest, in order.

        `pin`: once all are stored, the last one is pinned softly, which holds the others; in a set each that is stored.
        """
        plan = PutPlan(namespace, namespace.epoch, pin)
        known = {b""} if not parent or self._index.find(namespace, parent) else set()
        for key in keys:
            plan.items.append(PutItem(key, parent if namespace.chain else b""))
            parent = key
        if namespace.chain and plan.items and not known and plan.items[0].parent:
            self._reject(plan.items, Reject.NO_PARENT)
            return plan
        wanted = self._new_items(plan)
        self._hold_parent(plan)
        try:
            # In a set a block that is refused says nothing of the next one.
            for batch in [wanted] if namespace.chain else [[item] for item in wanted]:
                self._take(plan, batch)
        except BaseException:  # as MemoryError: the pin must not outlive it
            self._let_go(plan)
            raise
        return plan

    def _take(self, plan: PutPlan, wanted: list[PutItem]) -> None:
        """Give slots to new blocks, as far as there is room and they are worth it."""
        if not wanted:
            return
        namespace, keys = plan.namespace, [item.key for item in wanted]
        self._residency.refer(namespace, b"".join(keys))
        if self._residency.up[COLD]:
            self._residency.admission.missed(namespace, keys, self._residency.counts[COLD].blocks)
        slots, refused, settled = self._residency.take(namespace, len(keys), plan, keys)
        for number, (item, slot) in enumerate(zip(wanted, slots, strict=False)):
            item.slot = slot
            item.passes = number >= settled
        if refused:
            self._refuse(plan, wanted[len(slots)], Reject.NOT_ADMITTED)
        elif len(slots) < len(wanted):
            limited = self._residency.budgets[WARM].over_limit(namespace, namespace.slot_bytes)
            self._refuse(plan, wanted[len(slots)], Reject.QUOTA if limited else Reject.NO_ROOM)

    def cancel(self, plan: PutPlan) -> None:
        """Give a plan's slots back, as if it had never begun."""
        for item in plan.items:
            if item.slot is not None:
                slot, item.slot = item.slot, None
                self._residency.abandon(slot)
        self._let_go(plan)

    def finish(self, plan: PutPlan) -> None:
        """Publish what was copied (items with a checksum) and give the other slots back."""
        stale = plan.epoch != plan.namespace.epoch
        published: list[Block] = []
        for item in plan.items:
            if item.slot is None:
                continue
            slot, item.slot = item.slot, None
            if stale or not item.checksum:
                item.reason = Reject.CLEARED if stale else (item.reason or Reject.DEADLINE)
                self._residency.abandon(slot)
            elif (block := self._publish(plan.namespace, item, slot)) is not None:
                published.append(block)
        if plan.namespace.chain:
            # Only a leaf's stamp counts, and they hang on one another: one integer of 32 bytes for all.
            stamp = published[-1].touched if published else 0
            for block in published:
                block.touched = stamp
        if plan.pin and not stale:
            self._pin(plan)
        self._let_go(plan)
        self._count(plan.items)

    def _pin(self, plan: PutPlan) -> None:
        kept = [item for item in plan.items if item.status is not PutStatus.REJECTED]
        if plan.namespace.chain:
            kept = kept[-1:] if len(kept) == len(plan.items) else []
        for item in kept:
            block = self._index.find(plan.namespace, item.key)
            if block is not None:
                pin(self._residency, block, pinned=True)

    def _publish(self, namespace: Namespace, item: PutItem, slot: Slot) -> Block | None:
        """Returns the block, if it was stored."""
        held = namespace.blocks.get(item.key)
        if held is not None and held.present:
            item.status = PutStatus.EXISTS
            self._residency.abandon(slot)
            return None
        block = (
            None if held is not None and held.slot is not None else self._index.insert(namespace, item.key, item.parent)
        )
        if block is None:  # the parent has gone, or an agent is still filling the hole
            item.reason = Reject.NO_PARENT
            self._residency.abandon(slot)
            return None
        if block.copies:  # an orphan that its parent has just brought back
            item.status = PutStatus.EXISTS
            self._residency.abandon(slot)
            return None
        block.checksum = item.checksum
        block.lossy = b""  # a hole may remember the cold copy that it lost
        item.status = PutStatus.STORED
        self._residency.stamp(block)
        if item.passes:
            self._residency.pass_through(block)
        self._residency.gain_warm(block, slot)
        return block

    def _new_items(self, plan: PutPlan) -> list[PutItem]:
        wanted, shards = [], plan.namespace.blocks.shards
        for item in plan.items:
            block = shards[item.key[0]].get(item.key)
            if block is not None and block.present:
                item.status = PutStatus.EXISTS
            else:
                wanted.append(item)
        return wanted

    def _hold_parent(self, plan: PutPlan) -> None:
        """Pin what the new blocks will hang on until finish: the room for them must not be made by dropping it."""
        if not plan.items:
            return
        names = [plan.items[0].parent, *(item.key for item in plan.items if item.status == PutStatus.EXISTS)]
        found = [block for name in names if name and (block := self._index.find(plan.namespace, name)) is not None]
        for block in found[-1:] if plan.namespace.chain else found:
            # A prefix that is stored piece by piece has not been read yet; what is put a second time has a second user.
            self._residency.touch(block, reused=block.key != plan.items[0].parent)
        if found and found[-1].slot is not None:
            found[-1].slot.pins += 1
            plan.held = found[-1].slot

    def _let_go(self, plan: PutPlan) -> None:
        if plan.held is not None:
            held, plan.held = plan.held, None
            self._residency.slots.unpin(held)
            if isinstance(held.owner, Block):
                self._residency.orders.offer(held.owner)

    def _refuse(self, plan: PutPlan, first: PutItem, reason: Reject) -> None:
        """`first` cannot be stored, so in a chain nothing after it can."""
        at = plan.items.index(first)
        first.reason = reason
        for item in plan.items[at + 1 :] if plan.namespace.chain else ():
            if item.status == PutStatus.REJECTED and item.slot is None:
                item.reason = Reject.NO_PARENT

    def _reject(self, items: list[PutItem], reason: Reject) -> None:
        for item in items:
            item.reason = reason

    def _count(self, items: list[PutItem]) -> None:
        for item in items:
            if item.status == PutStatus.STORED:
                self.stored += 1
            elif item.status == PutStatus.EXISTS:
                self.exists += 1
            else:
                self.rejected[item.reason] = self.rejected.get(item.reason, 0) + 1
