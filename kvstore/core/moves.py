"""Moves that the engine carries out in the background: saving to cold, copying to hot, emptying what was cleared."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from kvstore.core.block import COLD, HOT, WARM, Block
from kvstore.core.reads import Reads
from kvstore.core.residency import Residency, slot_bytes
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

    def wants_saving(self) -> bool:
        """Whether too little of warm could be dropped for free."""
        residency = self._residency
        if not residency.up[COLD] or not residency.dirty:
            return False
        budget = residency.budgets[WARM]
        free = budget.capacity_bytes - budget.used_bytes
        return free + residency.clean_bytes < SAVE_AHEAD * budget.capacity_bytes

    def begin_saves(self, count: int, nbytes: int) -> list[Copy]:
        """Up to `count` blocks of up to `nbytes` together (at least one), pinned until `saved`; oldest first."""
        batch: list[Copy] = []
        for block, slot in self._oldest_dirty(count):
            if batch and nbytes < slot_bytes(block):
                break
            # Making room may drop the cold copy of a block that is still warm, which makes that one dirty again.
            if not self._has_cold_room(block):
                break
            nbytes -= slot_bytes(block)
            block.saving = True
            slot.pins += 1
            batch.append(Copy(block, slot))
        return batch

    def _oldest_dirty(self, count: int) -> list[Copy]:
        found: list[Copy] = []
        for block in self._residency.dirty:
            slot = block.slot
            if slot is not None and slot.state == SlotState.READY and not block.saving:
                found.append(Copy(block, slot))
                if len(found) == count:
                    break
        return found

    def saved(self, copy: Copy, stored_bytes: int | None) -> None:
        """The cold tier has answered; None: it did not take the block."""
        residency = self._residency
        block = copy.block
        block.saving = False
        residency.slots.unpin(copy.slot)
        if stored_bytes is None:
            residency.counts[COLD].write_failures += 1
        elif not block.copies:
            residency.deletes[COLD].append((block.namespace.digest, block.key))
        else:
            residency.counts[COLD].writes += 1
            residency.gain_below(block, COLD, stored_bytes)
        residency.offer(block)

    def begin_promotions(self, count: int) -> list[Copy]:
        """Up to `count` blocks to copy to hot, pinned until `promoted`."""
        residency = self._residency
        batch: list[Copy] = []
        queue = self._reads.promotions
        while queue and len(batch) < count:
            block = next(iter(queue))
            del queue[block]
            slot = block.slot
            if not residency.up[HOT] or block.copies & HOT or slot is None or slot.state != SlotState.READY:
                continue
            if not residency.make_room_below(
                HOT, block.namespace.tenant, (len(batch) + 1) * block.namespace.block_nbytes
            ):
                continue
            slot.pins += 1
            batch.append(Copy(block, slot))
        return batch

    def promoted(self, copy: Copy, stored: bool) -> None:
        """The hot tier has answered."""
        residency = self._residency
        block = copy.block
        residency.slots.unpin(copy.slot)
        if not stored:
            residency.counts[HOT].write_failures += 1
        elif not block.copies or not residency.up[HOT]:
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
                if block.slot is None:
                    self._residency.index.lost(block)

    def _has_cold_room(self, block: Block) -> bool:
        nbytes = block.namespace.block_nbytes
        return self._residency.make_room_below(COLD, block.namespace.tenant, nbytes)
