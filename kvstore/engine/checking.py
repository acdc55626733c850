"""Verifies stored copies on request: every byte is read again and its checksum compared."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import xxhash

from kvstore.core.block import COLD, WARM, Block
from kvstore.core.cache import BlockCache
from kvstore.core.slots import Slot, SlotState
from kvstore.engine.mover import Mover
from kvstore.protocol.errors import InvalidRequest, QuotaExceeded
from kvstore.tiers.base import Outcome
from kvstore.tiers.warm import WarmPool


class Checker:
    """Checks one tier, block by block, beside the daemon's other work."""

    def __init__(self, lock: threading.Lock, cache: BlockCache, pool: WarmPool, mover: Mover) -> None:
        self._lock = lock
        self._cache = cache
        self._pool = pool
        self._mover = mover

    def verify(self, tier: int) -> tuple[int, int]:
        """(checked, corrupt) over the copies in `tier`.

        Raises:
            InvalidRequest: the tier is off.
            QuotaExceeded: there is no slot free to read a cold block into.
        """
        if tier == WARM:
            results = [self._check_warm(block) for block in self._with_copy(WARM)]
        elif self._mover.tier(tier) is not None:
            results = [self._check_below(block, tier) for block in self._with_copy(tier)]
        else:
            raise InvalidRequest(f"the {'cold' if tier == COLD else 'hot'} tier is off")
        known = [good for good in results if good is not None]
        return len(known), known.count(False)

    def _with_copy(self, tier: int) -> Iterator[Block]:
        with self._lock:
            blocks = [b for n in self._cache.index.namespaces.values() for b in n.blocks.values() if b.copies & tier]
        yield from blocks

    def _check_warm(self, block: Block) -> bool | None:
        with self._lock:
            slot = block.slot
            if not block.copies & WARM or slot is None or slot.state is not SlotState.READY:
                return None
            slot.pins += 1
        place = self._pool.range_of(slot.slab_id, slot.index, block.namespace.block_nbytes)
        good = xxhash.xxh3_128(self._pool.view(place).data).digest() == block.checksum
        with self._lock:
            if not good and block.slot is slot:
                self._cache.residency.counts[WARM].corrupt += 1
                self._pool.set_generation(slot.slab_id, slot.index, 0)  # also for leases that read it at this moment
                self._cache.residency.drop_warm(block)
                self._cache.index.lost(block)
            self._cache.slots.unpin(slot)
            self._cache.residency.offer(block)
        return good

    def _check_below(self, block: Block, tier: int) -> bool | None:
        with self._lock:
            if not block.copies & tier or not self._cache.residency.up[tier]:
                return None
            slots = self._cache.residency.take(block.namespace, 1, self)
        if not slots:
            raise QuotaExceeded("no warm slot is free to read a block into; release leases and try again")
        outcome = self._mover.read_one(tier, block, slots[0])
        with self._lock:
            self._cache.residency.abandon(slots[0])
            if outcome in (Outcome.OK, Outcome.BUSY):
                return True if outcome is Outcome.OK else None
            return self._drop_bad(block, tier, outcome, slots[0])

    def _drop_bad(self, block: Block, tier: int, outcome: Outcome, scratch: Slot) -> bool | None:
        if not block.copies & tier or (block.slot is not None and block.slot.state is SlotState.FILLING):
            return None  # it has gone meanwhile, or a load is finding out by itself
        self._cache.residency.counts[tier].corrupt += outcome is Outcome.CORRUPT
        self._cache.residency.drop_below(block, tier, delete=False)
        self._cache.index.lost(block)
        return False
