"""Carries out the core's moves. The warm pool is the hub: every copy goes into it or out of it.

What comes in is loaded here; what goes out is the saver's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from kvstore.core.block import Block
from kvstore.core.cache import BlockCache
from kvstore.core.slots import Slot
from kvstore.engine.guarded import guarded
from kvstore.engine.inflight import InFlight
from kvstore.engine.saver import Saver
from kvstore.engine.spokes import AgentedTier, DurableTier, Spokes
from kvstore.protocol.errors import KVStoreError
from kvstore.tiers.base import Outcome, TierItem
from kvstore.tiers.warm import WarmPool

__all__ = ["AgentedTier", "DurableTier", "Mover"]

# What one call asks for. Blocks are settled one by one as the agent answers, so a call can be long; two of them keep
# four readers busy, and later loads of more urgent prefixes do not wait behind more than these.
_LOAD_BLOCKS = 64
_LOAD_BYTES = 8 << 20
_LOADERS = 2

_log = logging.getLogger(__name__)


class _Loading(NamedTuple):
    """A batch that an agent was asked for; `settled` says of each block whether it has been answered."""

    tier: int
    batch: list[tuple[Block, Slot]]
    items: list[TierItem]
    settled: list[bool]


class Mover:
    """Loads on threads of its own, and the saver."""

    def __init__(
        self, lock: threading.Lock, cache: BlockCache, pool: WarmPool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lock = lock
        self._clock = clock
        self._cache = cache
        self.inflight = InFlight()
        self._spokes = Spokes(pool)
        self._saver = Saver(lock, cache, self._spokes)
        self._load_wake = threading.Condition(lock)
        self._closing = False
        self._threads: list[threading.Thread] = []

    def attach(self, tier: int, medium: AgentedTier) -> None:
        """Add a spoke (HOT or COLD), before start."""
        self._spokes.attach(tier, medium)

    def tier(self, tier: int) -> AgentedTier | None:
        """The spoke, if there is one."""
        return self._spokes.get(tier)

    def states(self) -> Mapping[int, AgentedTier]:
        """The spokes, by tier."""
        return self._spokes.media()

    def counters(self) -> Mapping[str, int]:
        """What the saver did so far."""
        return self._saver.counters()

    def start(self) -> None:
        """Start the threads that the attached tiers need."""
        self._saver.start()
        for number in range(_LOADERS if self._spokes.media() else 0):
            thread = threading.Thread(target=self._load_loop, name=f"loader-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def kick_loads(self) -> None:
        """There may be loads. Under the lock."""
        loads = len(self._cache.reads.loads)
        if loads:
            self._load_wake.notify(1 if loads <= _LOAD_BLOCKS // 8 else _LOADERS)

    def kick_saves(self) -> None:
        """There may be something to save, promote, delete or empty. Cheap."""
        self._saver.kick()

    def wake_saver(self) -> None:
        """Run the saver whatever the thresholds say."""
        self._saver.wake()

    def slab_dropped(self, slab_id: int) -> None:
        """A slab has been retired: agents unmap it."""
        self._spokes.slab_dropped(slab_id)

    def flush(self, timeout_s: float) -> int:
        """Save every dirty block, as far as the time and the medium allow; returns how many are left."""
        return self._saver.flush(timeout_s)

    def close(self) -> bool:
        """Stop after what is under way and the deletions that are due; returns whether the cold tier took them.

        Bounded by the tiers' own time-outs.
        """
        self._closing = True
        with self._lock:
            self._load_wake.notify_all()
        deleted = self._saver.close()
        for thread in self._threads:
            thread.join(35.0)
        return deleted

    # -- loads ------------------------------------------------------------------------------------------------

    def _load_loop(self) -> None:
        while not self._closing:
            guarded(self._load_step)

    def _load_step(self) -> None:
        with self._lock:
            while not self._cache.reads.loads and not self._closing:
                self._load_wake.wait()
            if self._closing:
                return
            tier, batch = self._next_loads()
        if batch:
            self._load(tier, batch)

    def _next_loads(self) -> tuple[int, list[tuple[Block, Slot]]]:
        """A run of loads from one tier, in prefix order."""
        loads = self._cache.reads.loads
        batch: list[tuple[Block, Slot]] = []
        tier = nbytes = 0
        while loads and len(batch) < _LOAD_BLOCKS:
            block = loads[0]
            source = self._cache.reads.source(block)
            nbytes += block.namespace.block_nbytes
            if batch and (source != tier or nbytes > _LOAD_BYTES):
                break
            loads.popleft()
            slot = block.slot
            assert slot is not None
            if not source:
                self._failed(block, slot, 0)
                continue
            tier = source
            batch.append((block, slot))
        if batch:
            self._cache.gate.costs.began(tier, self._clock())
        return tier, batch

    def _load(self, tier: int, batch: list[tuple[Block, Slot]]) -> None:
        """Ask for a batch; blocks are settled as they come, the rest when the agent can touch no slot any more."""
        medium = self._spokes.get(tier)
        assert medium is not None
        settled = [False] * len(batch)
        try:
            loading = _Loading(tier, batch, self._spokes.items(tier, batch), settled)
            medium.read(loading.items, partial(self._settle, loading))
        except (KVStoreError, OSError, MemoryError) as error:  # no descriptors, no memory, an agent that refuses
            _log.warning("%d loads from %s failed: %s", len(batch), medium.name, error)
        with self._lock:
            self._cache.gate.costs.ended(tier)
            for (block, slot), done in zip(batch, settled, strict=True):
                if not done:  # what went with its agent says nothing of the medium
                    self._failed(block, slot, 0)
        self._saver.kick()

    def _settle(self, loading: _Loading, first: int, outcomes: Sequence[Outcome]) -> None:
        """Blocks from `first` on have been answered. On the thread that hears the agent."""
        tier, came_bytes = loading.tier, 0
        with self._lock:
            for at, outcome in enumerate(outcomes, first):
                loading.settled[at] = True
                block, slot = loading.batch[at]
                if outcome is Outcome.OK:
                    self._cache.reads.loaded(block, tier)
                    self.inflight.settle(slot)
                    came_bytes += block.namespace.block_nbytes
                elif outcome is Outcome.BUSY or loading.items[at].checksum != self._spokes.checksum(tier, block):
                    self._failed(block, slot, 0)  # not now; or the copy that is meant now is another one
                else:
                    self._cache.residency.counts[tier].corrupt += outcome is Outcome.CORRUPT
                    self._failed(block, slot, tier)
            if came_bytes:
                self._cache.gate.costs.came(tier, came_bytes, self._clock())
            self.kick_loads()

    def _failed(self, block: Block, slot: Slot, lost_tier: int) -> None:
        self._cache.reads.load_failed(block, lost_tier)
        if block.slot is not slot:  # not tried again from another tier
            self.inflight.settle(slot)

    def read_one(self, tier: int, block: Block, scratch: Slot) -> Outcome:
        """Read a block's copy into a slot of the caller's, to check it."""
        medium = self._spokes.get(tier)
        assert medium is not None
        found = [Outcome.BUSY]  # what went with its agent says nothing of the medium

        def settle(first: int, outcomes: Sequence[Outcome]) -> None:
            found[0] = outcomes[0]

        try:
            medium.read(self._spokes.items(tier, [(block, scratch)]), settle)
        except (KVStoreError, OSError, MemoryError) as error:
            _log.warning("a check of %s failed: %s", medium.name, error)
        return found[0]
