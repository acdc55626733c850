"""Verifies stored copies on request: every byte is read again and its checksum compared."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import takewhile
from typing import NamedTuple, cast

import xxhash

from kvstore.core.block import COLD, WARM, Block, Namespace
from kvstore.core.cache import TIER_NAMES, BlockCache
from kvstore.core.index import KEY_BYTES
from kvstore.core.slots import Slot, SlotState
from kvstore.engine.mover import DurableTier, Mover
from kvstore.protocol.errors import InvalidRequest, QuotaExceeded
from kvstore.tiers.base import BlockRef, Outcome
from kvstore.tiers.warm import WarmPool
from kvstore.v1 import admin_pb2

# Of raw bytes in one call of the agent, which is then well within its time even on a slow disk.
_PAGE_BYTES = 256 << 20
_PAGE_BLOCKS = 1024


class Scratch(NamedTuple):
    """Fills a slot that a block is read into only to be looked at."""

    namespace: Namespace


class Checker:
    """Checks one tier, block by block, beside the daemon's other work."""

    def __init__(self, lock: threading.Lock, cache: BlockCache, pool: WarmPool, mover: Mover) -> None:
        self._lock = lock
        self._cache = cache
        self._pool = pool
        self._mover = mover

    def verify(self, tier: int) -> tuple[int, int]:
        """(checked, corrupt) over the copies in warm or hot; bad ones are dropped.

        Raises:
            InvalidRequest: the tier is off.
            QuotaExceeded: there is no slot free to read a hot block into.
        """
        if tier == WARM:
            results = [self._check_warm(block) for block in self._with_copy(WARM)]
        elif self._mover.tier(tier) is not None:
            results = [self._check_below(block, tier) for block in self._with_copy(tier)]
        else:
            raise InvalidRequest(f"the {TIER_NAMES[tier]} tier is off")
        known = [good for good in results if good is not None]
        return len(known), known.count(False)

    def check_cold(self, after: bytes, limit: int, repair: bool) -> admin_pb2.VerifyResponse:
        """Check a page of the cold tier as it lies on the disk, behind namespace and key `after` (empty: the start).

        At most `limit` blocks (0: as many as are quick). With `repair` bad copies go; where warm has the block too, it
        is saved again.

        Raises:
            InvalidRequest: the tier is off.
            KVStoreError: its agent is down, or too slow.
        """
        medium = self._mover.tier(COLD)
        if medium is None:
            raise InvalidRequest("the cold tier is off")
        cold = cast(DurableTier, medium)
        position = BlockRef(after[:KEY_BYTES], after[KEY_BYTES:]) if after else None
        page = cold.check(position, min(limit or _PAGE_BLOCKS, self._page_blocks()), repair)
        if page.repaired:
            self._forget_lost(cold, position, page.last)
        last = b"" if page.last is None else page.last.namespace + page.last.key
        return admin_pb2.VerifyResponse(
            checked=page.checked, corrupt=page.corrupt, missing=page.missing, repaired=page.repaired, last=last
        )

    def _page_blocks(self) -> int:
        with self._lock:
            blocks, nbytes = self._cache.residency.counts[COLD].blocks, self._cache.residency.raw_cold_bytes
        return max(1, min(_PAGE_BLOCKS, _PAGE_BYTES * blocks // max(1, nbytes)))

    def _forget_lost(self, cold: DurableTier, after: BlockRef | None, last: BlockRef | None) -> None:
        """Drop the records of copies that the medium has no more, in (after, last]."""

        def in_page(ref: BlockRef) -> bool:
            return (after is None or ref > after) and (last is None or ref <= last)

        held = {ref: b for b in self._with_copy(COLD) if in_page(ref := BlockRef(b.namespace.digest, b.key))}
        stored = {record.ref for record in takewhile(lambda record: in_page(record.ref), cold.scan(after))}
        with self._lock:
            residency = self._cache.residency
            for ref in held.keys() - stored:
                block = held[ref]
                filling = block.slot is not None and block.slot.state is SlotState.FILLING
                if block.copies & COLD and not filling:  # else a load is finding out by itself
                    residency.counts[COLD].corrupt += 1
                    residency.drop_below(block, COLD)  # and deleted: it may have been saved anew meanwhile
                    self._cache.index.lost(block)
        self._mover.kick_saves()

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
            self._cache.residency.orders.offer(block)
        return good

    def _check_below(self, block: Block, tier: int) -> bool | None:
        with self._lock:
            if not block.copies & tier or not self._cache.residency.up[tier]:
                return None
            slots = self._cache.residency.take(block.namespace, 1, Scratch(block.namespace)).slots
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
