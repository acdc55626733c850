"""Moves that the engine carries out in the background: saving to cold, copying to hot, emptying what was cleared."""

from __future__ import annotations

from collections import deque
from collections.abc import Container
from typing import NamedTuple

from kvstore.core.block import COLD, HOT, WARM, Block
from kvstore.core.reads import Reads
from kvstore.core.residency import ClassKey, Residency, slot_bytes
from kvstore.core.slots import Slot, SlotState

# A victim that was saved before it must go costs nothing to drop. The design asks for 5 % of warm; a burst of puts
# that outruns the SSD for half a second needs more, and what is saved early is written once all the same.
SAVE_AHEAD = 0.20


class Copy(NamedTuple):
    """A copy out of warm that is under way: the slot is pinned until its outcome is told."""

    block: Block
    slot: Slot


class Moves:
    """What to copy between tiers next."""

    def __init__(self, residency: Residency, reads: Reads) -> None:
        self._residency = residency
        self._reads = reads
        self._condemned: deque[dict[bytes, Block]] = deque()
        self._promoting: set[Block] = set()

    def wants_saving(self) -> bool:
        """Whether too little of warm could be dropped for free."""
        residency = self._residency
        if not residency.up[COLD] or not residency.dirty:
            return False
        budget = residency.budgets[WARM]
        free = budget.capacity_bytes - budget.used_bytes
        return free + residency.ahead_bytes < SAVE_AHEAD * budget.capacity_bytes

    def begin_saves(self, count: int, nbytes: int) -> list[Copy]:
        """Up to `count` blocks of up to `nbytes` together (at least one), pinned until `saved`; oldest first.

        None while cleared blocks wait to be emptied: their copies must be deleted before newer ones of the same
        keys are written.
        """
        batch: list[Copy] = []
        crowded: set[ClassKey] = set()  # no room below, and nothing that may leave: the others must not wait for it
        while not self._condemned and (found := self._oldest_dirty(count - len(batch), crowded)):
            for copy in found:
                block = copy.block
                if batch and nbytes < slot_bytes(block):
                    return batch
                if not self._reserve(COLD, block):
                    crowded.add(_class_of(block))
                    continue
                nbytes -= slot_bytes(block)
                block.saving = True
                copy.slot.pins += 1
                batch.append(copy)
        return batch

    def _oldest_dirty(self, count: int, crowded: Container[ClassKey]) -> list[Copy]:
        found: list[Copy] = []
        for block in self._residency.dirty if count > 0 else ():
            slot = block.slot
            if slot is None or slot.state != SlotState.READY or block.saving:
                continue
            if not crowded or _class_of(block) not in crowded:
                found.append(Copy(block, slot))
                if len(found) == count:
                    break
        return found

    def saved(self, copy: Copy, stored_bytes: int | None) -> None:
        """The cold tier has answered; None: it did not take the block."""
        residency = self._residency
        block = copy.block
        block.saving = False
        self._end(COLD, copy)
        if stored_bytes is None:
            residency.counts[COLD].write_failures += 1
            if block in residency.dirty:  # to the end: the others must not wait for it
                del residency.dirty[block]
                residency.dirty[block] = None
        elif block.slot is not copy.slot:  # dropped meanwhile; if it was stored again, then with bytes of its own
            residency.deletes[COLD].append((block.namespace.digest, block.key))
        else:
            residency.counts[COLD].writes += 1
            residency.gain_below(block, COLD, stored_bytes)
            self._trim_cold(block.namespace.tenant)
        residency.offer(block)

    def begin_promotions(self, count: int) -> list[Copy]:
        """Up to `count` blocks to copy to hot, pinned until `promoted`."""
        residency = self._residency
        batch: list[Copy] = []
        queue = self._reads.promotions
        while queue and len(batch) < count and not self._condemned:
            block = next(iter(queue))
            del queue[block]
            slot = block.slot
            if block.copies & HOT or block in self._promoting or slot is None or slot.state != SlotState.READY:
                continue
            if residency.up[HOT] and self._reserve(HOT, block):
                self._promoting.add(block)
                slot.pins += 1
                batch.append(Copy(block, slot))
        return batch

    def promoted(self, copy: Copy, stored: bool) -> None:
        """The hot tier has answered."""
        residency = self._residency
        block = copy.block
        self._promoting.discard(block)
        self._end(HOT, copy)
        if not stored:
            residency.counts[HOT].write_failures += 1
        elif block.slot is not copy.slot or not residency.up[HOT]:
            residency.deletes[HOT].append((block.namespace.digest, block.key))
        else:
            residency.counts[HOT].writes += 1
            residency.gain_below(block, HOT, block.namespace.block_nbytes)
        residency.offer(block)

    def condemn(self, blocks: dict[bytes, Block]) -> None:
        """Take blocks that no lookup can find any more, to be emptied piece by piece."""
        if blocks:
            self._condemned.append(blocks)

    def reap(self, count: int) -> bool:
        """Empty up to `count` condemned blocks; returns whether there are more."""
        while self._condemned and count > 0:
            blocks = self._condemned[0]
            while blocks and count > 0:
                _, block = blocks.popitem()  # newest first: children before their parents
                self._residency.forget(block)
                count -= 1
            if not blocks:
                self._condemned.popleft()
        return bool(self._condemned)

    def tier_lost(self, tier: int, blocks: list[Block]) -> None:
        """A volatile tier has lost all it had."""
        for block in reversed(blocks):
            if block.copies & tier:
                self._residency.drop_below(block, tier, delete=False)
                self._residency.index.lost(block)

    def _reserve(self, tier: int, block: Block) -> bool:
        """Make room for a copy and count it at once, so that a batch cannot take the same room twice."""
        tenant, nbytes = block.namespace.tenant, block.namespace.block_nbytes
        if not self._residency.make_room_below(tier, tenant, nbytes, spare_warm=tier == COLD):
            return False
        self._residency.budgets[tier].add(tenant, nbytes)
        return True

    def _trim_cold(self, tenant: str) -> None:
        """What was stored may take more than its raw bytes, for which there was room."""
        make_room = self._residency.make_room_below
        if not make_room(COLD, tenant, 0, spare_warm=True):
            make_room(COLD, tenant, 0)

    def _end(self, tier: int, copy: Copy) -> None:
        namespace = copy.block.namespace
        self._residency.slots.unpin(copy.slot)
        self._residency.budgets[tier].remove(namespace.tenant, namespace.block_nbytes)


def _class_of(block: Block) -> ClassKey:
    return (block.namespace.tenant, block.namespace.slot_bytes)
