"""Carries out the core's moves. The warm pool is the hub: every copy goes into it or out of it."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from kvstore.core.block import COLD, HOT, Block
from kvstore.core.cache import BlockCache
from kvstore.core.moves import Copy
from kvstore.core.slots import Slot
from kvstore.engine.inflight import InFlight
from kvstore.protocol.errors import KVStoreError
from kvstore.tiers.base import BlockRef, Outcome, StoredRecord, Tier, TierItem, WriteResult
from kvstore.tiers.warm import WarmPool

# Small enough that the first blocks of a prefix are readable early, large enough that the frames do not count.
_LOAD_BLOCKS = 4
_SAVE_BLOCKS = 8
_SAVE_BYTES = 16 << 20
_RETRY_S = 1.0
_REAP_BLOCKS = 256
_PAUSE_AFTER_DEFECT_S = 0.1

_log = logging.getLogger(__name__)


class AgentedTier(Tier, Protocol):
    """A tier behind an agent: it maps slabs by id, and may be down for a while."""

    @property
    def state(self) -> str:
        """ok, starting, or down and why."""

    @property
    def restarts(self) -> int:
        """How many agents have been replaced."""

    @property
    def device(self) -> str:
        """Where the bytes are, for people."""

    def map_slab(self, slab_id: int, fd: int, segment_bytes: int) -> None:
        """Let the agent (and its successors) map a slab."""

    def unmap_slab(self, slab_id: int) -> None:
        """The slab has gone."""


class DurableTier(AgentedTier, Protocol):
    """An agented tier that finds its blocks again after a restart."""

    def scan(self) -> Iterator[StoredRecord]:
        """Every record. Raises KVStoreError where its agent goes meanwhile."""

    def flush(self) -> None:
        """Return once everything written before is durable."""


class Mover:
    """Loads, saves, promotions and deletions, each on threads of its own."""

    def __init__(self, lock: threading.Lock, cache: BlockCache, pool: WarmPool) -> None:
        self._lock = lock
        self._cache = cache
        self._pool = pool
        self.inflight = InFlight()
        self._tiers: dict[int, AgentedTier] = {}
        self._mapped: dict[int, set[int]] = {HOT: set(), COLD: set()}
        self._map_lock = threading.Lock()
        self._load_wake = threading.Condition(lock)
        self._save_wake = threading.Event()
        self._flushing = False
        self._closing = False
        self._threads: list[threading.Thread] = []

    def attach(self, tier: int, medium: AgentedTier) -> None:
        """Add a spoke (HOT or COLD), before start."""
        self._tiers[tier] = medium

    def tier(self, tier: int) -> AgentedTier | None:
        """The spoke, if there is one."""
        return self._tiers.get(tier)

    def start(self) -> None:
        """Start the threads that the attached tiers need."""
        jobs: list[tuple[str, Callable[[], None]]] = [("saver", self._save_loop)]
        if self._tiers:
            jobs += [("loader-0", self._load_loop), ("loader-1", self._load_loop)]
        for name, job in jobs:
            thread = threading.Thread(target=job, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def kick_loads(self) -> None:
        """There may be loads. Under the lock."""
        if self._cache.reads.loads:
            self._load_wake.notify_all()

    def kick_saves(self) -> None:
        """There may be something to save, promote, delete or empty. Cheap."""
        residency = self._cache.residency
        if (
            self._cache.moves.wants_saving()
            or self._cache.reads.promotions
            or residency.deletes[COLD]
            or residency.deletes[HOT]
        ):
            self._save_wake.set()

    def wake_saver(self) -> None:
        """Run the saver whatever the thresholds say."""
        self._save_wake.set()

    def slab_dropped(self, slab_id: int) -> None:
        """A slab has been retired: agents unmap it."""
        with self._map_lock:
            for tier, medium in self._tiers.items():
                if slab_id in self._mapped[tier]:
                    self._mapped[tier].discard(slab_id)
                    medium.unmap_slab(slab_id)

    def flush(self, timeout_s: float) -> int:
        """Save every dirty block, as far as the time allows; returns how many are left."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._flushing = True
        self._save_wake.set()
        while time.monotonic() < deadline and not self._closing:
            with self._lock:
                if not self._cache.residency.dirty or not self._cache.residency.up[COLD]:
                    break
            time.sleep(0.01)
        with self._lock:
            self._flushing = False
            return len(self._cache.residency.dirty)

    def close(self) -> bool:
        """Stop after what is under way and the deletions that are due; returns whether the cold tier took them.

        Bounded by the tiers' own time-outs.
        """
        self._closing = True
        with self._lock:
            self._load_wake.notify_all()
        self._save_wake.set()
        for thread in self._threads:
            thread.join(35.0)
        while self._reap():  # what was cleared or deleted must not come back after the restart
            pass
        self._delete(COLD)
        with self._lock:
            return not self._cache.residency.deletes[COLD]

    # -- loads ------------------------------------------------------------------------------------------------

    def _load_loop(self) -> None:
        while True:
            with self._lock:
                while not self._cache.reads.loads and not self._closing:
                    self._load_wake.wait()
                if self._closing:
                    return
                tier, batch = self._next_loads()
            if batch:
                _guarded(self._load, tier, batch)

    def _next_loads(self) -> tuple[int, list[tuple[Block, Slot]]]:
        """A run of loads from one tier, in prefix order."""
        loads = self._cache.reads.loads
        batch: list[tuple[Block, Slot]] = []
        tier = 0
        while loads and len(batch) < _LOAD_BLOCKS:
            block = loads[0]
            source = self._cache.reads.source(block)
            if batch and source != tier:
                break
            loads.popleft()
            slot = block.slot
            assert slot is not None
            if not source:
                self._failed(block, slot, 0)
                continue
            tier = source
            batch.append((block, slot))
        return tier, batch

    def _load(self, tier: int, batch: list[tuple[Block, Slot]]) -> None:
        medium = self._tiers[tier]
        restarts = medium.restarts
        try:
            outcomes = medium.read(self._items(tier, batch))
        except (KVStoreError, OSError, MemoryError) as error:  # no descriptors, no memory, an agent that refuses
            _log.warning("%d loads from %s failed: %s", len(batch), medium.name, error)
            outcomes = [Outcome.BUSY] * len(batch)
        with self._lock:
            # Between two agents a miss says nothing of the medium.
            interrupted = medium.restarts != restarts or not self._cache.residency.up[tier]
            for (block, slot), outcome in zip(batch, outcomes, strict=True):
                if outcome is Outcome.OK:
                    self._cache.reads.loaded(block, tier)
                    self.inflight.settle(slot)
                elif outcome is Outcome.BUSY or (outcome is Outcome.MISSING and interrupted):
                    self._failed(block, slot, 0)
                else:
                    self._cache.residency.counts[tier].corrupt += outcome is Outcome.CORRUPT
                    self._failed(block, slot, tier)
            self.kick_loads()
        self.kick_saves()

    def _failed(self, block: Block, slot: Slot, lost_tier: int) -> None:
        self._cache.reads.load_failed(block, lost_tier)
        if block.slot is not slot:  # not tried again from another tier
            self.inflight.settle(slot)

    def read_one(self, tier: int, block: Block, scratch: Slot) -> Outcome:
        """Read a block's copy into a slot of the caller's, to check it."""
        medium = self._tiers[tier]
        restarts = medium.restarts
        try:
            outcome = medium.read(self._items(tier, [(block, scratch)]))[0]
        except (KVStoreError, OSError, MemoryError) as error:
            _log.warning("a check of %s failed: %s", medium.name, error)
            return Outcome.BUSY
        with self._lock:
            interrupted = medium.restarts != restarts or not self._cache.residency.up[tier]
        return Outcome.BUSY if outcome is Outcome.MISSING and interrupted else outcome

    # -- saves, promotions, deletions -------------------------------------------------------------------------

    def _save_loop(self) -> None:
        while not self._closing:
            _guarded(self._save_step)

    def _save_step(self) -> None:
        busy = self._reap() | self._delete(COLD) | self._delete(HOT) | self._promote()
        saved = self._save()
        if saved is False:  # the tier took nothing: it is full, or down
            self._save_wake.clear()
            self._save_wake.wait(_RETRY_S)
        elif not busy and saved is None:
            self._save_wake.wait(_RETRY_S if self._wants_saving() else None)
            self._save_wake.clear()

    def _wants_saving(self) -> bool:
        with self._lock:
            return self._cache.moves.wants_saving() or (self._flushing and self._cache.residency.up[COLD])

    def _save(self) -> bool | None:
        """Save one batch: True if some was stored, False if none was, None if there was nothing to do."""
        medium = self._tiers.get(COLD)
        if medium is None:
            return None
        with self._lock:
            if not self._cache.moves.wants_saving() and not self._flushing:
                return None
            batch = self._cache.moves.begin_saves(_SAVE_BLOCKS, _SAVE_BYTES)
        if not batch:
            return None
        self._delete(COLD)  # what made room for them
        results = self._write(COLD, medium, batch)
        with self._lock:
            for copy, result in zip(batch, results, strict=True):
                self._cache.moves.saved(copy, result.stored_bytes if result.outcome is Outcome.OK else None)
            if any(result.outcome is Outcome.FULL for result in results):
                self._cache.evict(COLD, self._cache.residency.budgets[COLD].used_bytes // 32)
        return any(result.outcome is Outcome.OK for result in results)

    def _promote(self) -> bool:
        medium = self._tiers.get(HOT)
        if medium is None:
            return False
        with self._lock:
            batch = self._cache.moves.begin_promotions(_SAVE_BLOCKS)
        if not batch:
            return False
        self._delete(HOT)  # what made room for them
        results = self._write(HOT, medium, batch)
        with self._lock:
            for copy, result in zip(batch, results, strict=True):
                self._cache.moves.promoted(copy, result.outcome is Outcome.OK)
        return True

    def _write(self, tier: int, medium: AgentedTier, batch: Sequence[Copy]) -> list[WriteResult]:
        try:
            return medium.write(self._items(tier, batch))
        except (KVStoreError, OSError, MemoryError) as error:
            _log.warning("%d writes to %s failed: %s", len(batch), medium.name, error)
            return [WriteResult(Outcome.BUSY)] * len(batch)

    def _delete(self, tier: int) -> bool:
        """Deletions come before the next write on the same thread, so that they never hit a newer copy."""
        with self._lock:
            refs, self._cache.residency.deletes[tier] = self._cache.residency.deletes[tier], []
        medium = self._tiers.get(tier)
        if refs and medium is not None:
            try:
                medium.delete([BlockRef(namespace, key) for namespace, key in refs])
            except (KVStoreError, OSError, MemoryError) as error:
                _log.warning("%d deletions from %s failed, will be tried again: %s", len(refs), medium.name, error)
                with self._lock:
                    self._cache.residency.deletes[tier] = refs + self._cache.residency.deletes[tier]
                return False
        return bool(refs)

    def _reap(self) -> bool:
        with self._lock:
            return self._cache.moves.reap(_REAP_BLOCKS)

    # -- slabs ------------------------------------------------------------------------------------------------

    def _items(self, tier: int, batch: Sequence[tuple[Block, Slot]]) -> list[TierItem]:
        self._map({slot.slab_id for _, slot in batch}, tier)
        return [self._item(block, slot) for block, slot in batch]

    def _item(self, block: Block, slot: Slot) -> TierItem:
        namespace = block.namespace
        place = self._pool.range_of(slot.slab_id, slot.index, namespace.block_nbytes)
        above = block.parent  # read once: a delete may unlink it at any moment
        parent = above.key if above is not None else b""
        ref = BlockRef(namespace.digest, block.key)
        return TierItem(ref, place, block.checksum, parent, block.epoch, namespace.layout)

    def _map(self, slab_ids: set[int], tier: int) -> None:
        """Pass slabs that the agent has not seen; it must know a slab before a frame names it."""
        with self._map_lock:
            for slab_id in slab_ids - self._mapped[tier]:
                found = self._pool.writable_fd(slab_id)
                if found is not None:
                    _pass_fd(self._tiers[tier], slab_id, found)
                    self._mapped[tier].add(slab_id)

    def states(self) -> Mapping[int, AgentedTier]:
        """The spokes, by tier."""
        return self._tiers


def _pass_fd(medium: AgentedTier, slab_id: int, found: tuple[int, int]) -> None:
    fd, nbytes = found
    try:
        medium.map_slab(slab_id, fd, nbytes)
    finally:
        os.close(fd)


def _guarded(step: Callable[..., None], *arguments: object) -> None:
    """Run one step of a loop that must not end: without it nothing would be loaded or saved until a restart."""
    try:
        step(*arguments)
    except Exception:  # noqa: BLE001 - a defect of ours, said in full; the next step may do better
        _log.exception("a step of the mover failed")
        time.sleep(_PAUSE_AFTER_DEFECT_S)
